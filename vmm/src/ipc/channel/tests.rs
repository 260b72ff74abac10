//! Tests of [`Channel`]: sizes, descriptors, endings, and peers that misbehave.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::thread;

use rustix::io::{FdFlags, fcntl_getfd};
use serde::Deserialize;

use super::*;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Message {
    Named { name: String, numbers: BTreeMap<u32, u64> },
    State(Vec<u8>),
}

fn state(len_bytes: usize, seed: u8) -> Message {
    Message::State((0..len_bytes).map(|at| seed.wrapping_add((at % 251) as u8)).collect())
}

fn receive(channel: &Channel) -> (Message, Vec<OwnedFd>) {
    channel.receive().expect("receive").expect("not closed")
}

#[test]
fn messages_of_every_size_arrive_whole_and_in_order() {
    let (here, there) = Channel::pair().expect("pair");
    let named = Message::Named { name: "a".into(), numbers: BTreeMap::from([(1, u64::MAX)]) };
    let edge = INLINE_LIMIT_BYTES;
    let sizes = [0, 1, 200, edge - 4, edge - 3, edge, edge + 1, 300_000, 5 << 20];
    here.send(&named, &[]).expect("send");
    for (seed, len_bytes) in (0..).zip(sizes) {
        here.send(&state(len_bytes, seed), &[]).expect("send");
    }
    assert_eq!(receive(&there).0, named);
    for (seed, len_bytes) in (0..).zip(sizes) {
        let (message, descriptors) = receive(&there);
        assert_eq!(message, state(len_bytes, seed));
        assert!(descriptors.is_empty());
    }
}

#[test]
fn descriptors_travel_with_small_and_large_messages() {
    let (here, there) = Channel::pair().expect("pair");
    for len_bytes in [10, 1 << 20] {
        let (reader, mut writer) = io::pipe().expect("pipe");
        let zero = File::open("/dev/zero").expect("open");
        here.send(&state(len_bytes, 3), &[reader.as_fd(), zero.as_fd()]).expect("send");
        drop(reader);
        let (message, mut descriptors) = receive(&there);
        assert_eq!(message, state(len_bytes, 3));
        assert_eq!(descriptors.len(), 2);
        for descriptor in &descriptors {
            assert!(fcntl_getfd(descriptor).expect("flags").contains(FdFlags::CLOEXEC));
        }
        writer.write_all(b"through").expect("write");
        drop(writer);
        let mut text = String::new();
        File::from(descriptors.remove(0)).read_to_string(&mut text).expect("read");
        assert_eq!(text, "through");
    }
}

#[test]
fn as_many_descriptors_as_promised_and_no_more() {
    let (here, there) = Channel::pair().expect("pair");
    let zero = File::open("/dev/zero").expect("open");
    let many = vec![zero.as_fd(); DESCRIPTOR_LIMIT];
    here.send(&state(1 << 20, 0), &many).expect("send");
    assert_eq!(receive(&there).1.len(), DESCRIPTOR_LIMIT);
    let error = here.send(&state(1, 0), &vec![zero.as_fd(); DESCRIPTOR_LIMIT + 1]).expect_err("limit");
    assert!(matches!(error, IpcError::TooMuch { count: 253, .. }), "{error}");
}

#[test]
fn a_closed_peer_is_told_from_silence() {
    let (here, there) = Channel::pair().expect("pair");
    let error = there.receive_within::<Message>(Duration::from_millis(1)).expect_err("silence");
    assert!(matches!(error, IpcError::TimedOut { .. }), "{error}");
    // `there` has something unread when it is closed, and `here` something to read still.
    here.send(&state(5, 1), &[]).expect("send");
    there.send(&state(6, 2), &[]).expect("send");
    drop(there);
    assert_eq!(receive(&here).0, state(6, 2));
    assert!(here.receive::<Message>().expect("end").is_none());
    assert!(here.receive_within::<Message>(Duration::from_secs(5)).expect("end").is_none());
    assert!(matches!(here.send(&state(1, 0), &[]), Err(IpcError::Closed)));
}

#[test]
fn a_peer_that_does_not_read_times_the_sender_out() {
    let (here, _there) = Channel::pair().expect("pair");
    here.set_send_timeout(Some(Duration::from_millis(1))).expect("timeout");
    let error = (0..100_000).find_map(|_| here.send(&state(INLINE_LIMIT_BYTES / 2, 0), &[]).err());
    assert!(matches!(error, Some(IpcError::TimedOut { .. })), "{error:?}");
}

#[test]
fn many_threads_send_without_mixing() {
    let (here, there) = Channel::pair().expect("pair");
    thread::scope(|scope| {
        for seed in 0..4 {
            let here = &here;
            scope.spawn(move || {
                for len_bytes in [10, 20_000, 300, 40_000] {
                    here.send(&(seed, state(len_bytes, seed)), &[]).expect("send");
                }
            });
        }
        for _ in 0..16 {
            let (message, _) = there.receive::<(u8, Message)>().expect("receive").expect("open");
            let (seed, Message::State(bytes)) = message else { panic!("wrong message") };
            assert_eq!(Message::State(bytes.clone()), state(bytes.len(), seed));
        }
    });
}

#[test]
fn what_is_not_the_message_is_refused_and_the_channel_goes_on() {
    let (here, there) = Channel::pair().expect("pair");
    here.send(&9_u8, &[]).expect("send");
    assert!(matches!(there.receive::<Message>(), Err(IpcError::Encoding { .. })));
    here.send(&(1_u8, 2_u8), &[]).expect("send");
    assert!(matches!(there.receive::<u8>(), Err(IpcError::Malformed { .. })));
    let unsealed = rustix::fs::memfd_create("x", MemfdFlags::ALLOW_SEALING).expect("memfd");
    here.transmit(CARRIED, &4_u64.to_le_bytes(), &[unsealed.as_fd()]).expect("send");
    assert!(matches!(there.receive::<u8>(), Err(IpcError::Malformed { .. })));
    here.transmit(CARRIED, &4_u64.to_le_bytes(), &[]).expect("send");
    assert!(matches!(there.receive::<u8>(), Err(IpcError::Malformed { .. })));
    let carrier = fill_carrier(&[1; 8]).expect("carrier");
    here.transmit(CARRIED, &u64::MAX.to_le_bytes(), &[carrier.as_fd()]).expect("send");
    assert!(matches!(there.receive::<u8>(), Err(IpcError::TooMuch { .. })));
    here.transmit(77, &[], &[]).expect("send");
    assert!(matches!(there.receive::<u8>(), Err(IpcError::Malformed { .. })));
    here.send(&state(3, 3), &[]).expect("send");
    assert_eq!(receive(&there).0, state(3, 3));
}

#[test]
fn only_a_socket_of_the_right_type_becomes_a_channel() {
    let (here, there) = Channel::pair().expect("pair");
    let there = Channel::from_fd(there.into_fd()).expect("a channel");
    here.send(&1_u8, &[]).expect("send");
    assert_eq!(there.receive::<u8>().expect("receive").expect("open").0, 1);
    let (stream, _) = std::os::unix::net::UnixStream::pair().expect("pair");
    assert!(matches!(Channel::from_fd(stream.into()), Err(IpcError::Malformed { .. })));
}
