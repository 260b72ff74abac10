//! Tests of [`spawn_self`]: the test binary starts itself, with a part to play.

use std::io::Read as _;
use std::path::PathBuf;

use super::*;
use crate::ipc::Channel;

/// Tells the test binary, started again, which part it plays.
const ROLE: &str = "SALP_SPAWN_TEST_ROLE";

/// Starts the test binary so that it runs only [`a_child_plays_its_part`].
fn play(role: &str, descriptors: &[(BorrowedFd<'_>, RawFd)]) -> Child {
    let path = module_path!().split_once("::").expect("a module of the crate").1;
    let name = OsString::from(format!("{path}::a_child_plays_its_part"));
    let arguments = [name.as_os_str(), OsStr::new("--exact"), OsStr::new("--nocapture")];
    spawn_self(&arguments, &[(ROLE, OsStr::new(role))], descriptors).expect("spawn")
}

/// Not a test by itself: what the children of the tests below do.
#[test]
fn a_child_plays_its_part() {
    let Ok(role) = env::var(ROLE) else { return };
    match role.as_str() {
        "exit" => std::process::exit(33),
        "echo" => echo(),
        "sleep" => sleep(),
        "parent" => {
            let to_test = adopt(3).expect("adopt");
            let socket = adopt(4).expect("adopt");
            let grandchild = play("orphan", &[(to_test.as_fd(), 3), (socket.as_fd(), 4)]);
            let to_test = Channel::from_fd(to_test).expect("channel");
            to_test.send(&grandchild.pid().as_raw_pid(), &[grandchild.as_fd()]).expect("send");
            grandchild.wait().expect("wait");
        }
        "orphan" => {
            die_with_parent().expect("die with parent");
            Channel::from_fd(adopt(3).expect("adopt")).expect("channel").send(&0_i32, &[]).expect("send");
            sleep();
        }
        "take signals" => {
            let channel = Channel::from_fd(adopt(3).expect("adopt")).expect("channel");
            channel.send(&0_i32, &[]).expect("send");
            take_signals().expect("unblocked");
            // Where it was slow to come.
            channel.receive::<()>().expect("receive");
        }
        other => panic!("no part {other}"),
    }
    // Before the harness reports a test that is none.
    std::process::exit(0);
}

/// Two channels at numbers 3 and 4: says on each which it is, and which descriptors it has.
fn echo() {
    let channels = [3, 4].map(|number| Channel::from_fd(adopt(number).expect("adopt")).expect("channel"));
    for (number, channel) in (3_i32..).zip(&channels) {
        assert!(adopt(number).is_err(), "adopted twice");
        channel.send(&number, &[]).expect("send");
        channel.send(&open_descriptors(), &[]).expect("send");
    }
    assert!(channels[0].receive::<()>().expect("receive").is_none());
}

fn sleep() {
    let channel = Channel::from_fd(adopt(4).expect("adopt")).expect("channel");
    channel.receive::<()>().expect("receive");
}

fn open_descriptors() -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir("/proc/self/fd").expect("proc");
    let named = entries.map(|entry| entry.expect("entry").path()).filter_map(|path| {
        let number = path.file_name()?.to_string_lossy().into_owned();
        Some((number, std::fs::read_link(&path).ok()?))
    });
    named.collect()
}

#[test]
fn descriptors_arrive_at_their_numbers_and_no_others_do() {
    let (here, there) = Channel::pair().expect("pair");
    let (here_too, there_too) = Channel::pair().expect("pair");
    let secret = rustix::fs::memfd_create("salp-secret", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    let child = play("echo", &[(there.as_fd(), 4), (there_too.as_fd(), 3)]);
    drop((there, there_too));
    for (number, channel) in [(4, &here), (3, &here_too)] {
        assert_eq!(channel.receive::<i32>().expect("receive").expect("open").0, number);
        let (open, _) = channel.receive::<Vec<(String, PathBuf)>>().expect("receive").expect("open");
        let leaked = open.iter().find(|(_, target)| target.to_string_lossy().contains("salp-secret"));
        assert_eq!(leaked, None);
    }
    drop((here, here_too, secret));
    assert_eq!(child.wait().expect("wait"), Ending::Exited(0));
}

#[test]
fn an_ending_is_reported_again_and_again_and_nothing_is_left() {
    let child = play("exit", &[]);
    assert_eq!(child.wait().expect("wait"), Ending::Exited(33));
    assert_eq!(child.wait().expect("wait"), Ending::Exited(33));
    assert_eq!(child.try_wait().expect("wait"), Some(Ending::Exited(33)));
    child.kill().expect("nothing to kill");
    assert!(!PathBuf::from(format!("/proc/{}", child.pid().as_raw_pid())).exists(), "a zombie");
}

#[test]
fn a_dropped_child_is_killed_and_reaped() {
    let (_here, there) = Channel::pair().expect("pair");
    let child = play("sleep", &[(there.as_fd(), 4)]);
    assert_eq!(child.try_wait().expect("wait"), None);
    let process = PathBuf::from(format!("/proc/{}", child.pid().as_raw_pid()));
    assert!(process.exists());
    drop(child);
    assert!(!process.exists(), "runs on, or a zombie");
}

#[test]
fn a_killed_child_says_so_and_its_pidfd_becomes_readable() {
    let (_here, there) = Channel::pair().expect("pair");
    let child = play("sleep", &[(there.as_fd(), 4)]);
    let now = rustix::event::Timespec::default();
    assert_eq!(poll(&mut [PollFd::new(&child, PollFlags::IN)], Some(&now)), Ok(0));
    child.kill().expect("kill");
    assert_eq!(poll(&mut [PollFd::new(&child, PollFlags::IN)], None), Ok(1));
    assert_eq!(child.wait().expect("wait"), Ending::Killed(libc::SIGKILL));
}

#[test]
fn an_orphan_dies_with_its_parent() {
    let (to_test, there) = Channel::pair().expect("pair");
    let (_never_sent, socket) = Channel::pair().expect("pair");
    let parent = play("parent", &[(there.as_fd(), 3), (socket.as_fd(), 4)]);
    drop(there);
    // The parent's message and the orphan's come in either order; the pidfd is the parent's.
    let mut received = Vec::new();
    for _ in 0..2 {
        received.extend(to_test.receive::<i32>().expect("receive").expect("open").1);
    }
    let orphan = received.pop().expect("a pidfd");
    parent.kill().expect("kill");
    assert_eq!(parent.wait().expect("wait"), Ending::Killed(libc::SIGKILL));
    assert_eq!(poll(&mut [PollFd::new(&orphan, PollFlags::IN)], None), Ok(1));
}

#[test]
fn what_cannot_be_handed_over_or_adopted_is_refused() {
    let file = std::fs::File::open("/dev/zero").expect("open");
    for (numbers, reason) in [([3, 3], "two are"), ([2, 3], "standard")] {
        let descriptors = numbers.map(|number| (file.as_fd(), number));
        let error = spawn_self(&[], &[], &descriptors).expect_err("numbers");
        assert!(error.to_string().contains(reason), "{error}");
    }
    assert!(matches!(spawn_self(&[OsStr::new("a\0b")], &[], &[]), Err(SpawnError::Nul { .. })));
    assert!(matches!(adopt(file.as_raw_fd()), Err(SpawnError::Number { .. })));
    assert!(matches!(adopt(1_000_000), Err(SpawnError::Number { .. })));
    assert!(matches!(adopt(1), Err(SpawnError::Number { .. })));
    if env::var_os(PARENT_VARIABLE).is_none() {
        assert!(matches!(die_with_parent(), Err(SpawnError::NoParent)));
    }
}

#[test]
fn a_process_with_several_threads_is_not_copied() {
    // The harness runs each test in a thread of its own.
    assert!(matches!(copy_beside(), Err(SpawnError::Threads)));
}

#[test]
fn only_a_child_is_taken_over() {
    let parent = rustix::process::getppid().expect("a parent");
    assert!(matches!(Child::of(parent), Err(SpawnError::Host { .. })));
}

#[test]
fn variables_replace_what_had_their_name() {
    let variables = environment(&[("PATH", OsStr::new("x"))]).expect("environment");
    let paths: Vec<_> = variables.iter().filter(|text| text.as_bytes().starts_with(b"PATH=")).collect();
    assert_eq!(paths, [c"PATH=x"]);
    let mut all = String::new();
    for text in &variables {
        text.as_bytes().read_to_string(&mut all).expect("text");
    }
    assert!(all.contains(&format!("{PARENT_VARIABLE}={}", std::process::id())));
}

#[test]
fn a_signal_to_a_child_that_has_just_begun_comes_when_it_takes_signals() {
    for signal in [Signal::INT, Signal::TERM] {
        let (ours, theirs) = Channel::pair().expect("pair");
        let child = play("take signals", &[(theirs.as_fd(), 3)]);
        drop(theirs);
        rustix::process::kill_process(child.pid(), signal).expect("it was just started");
        let (word, _) = ours.receive::<i32>().expect("receive").expect("it lives long enough to say so");
        assert_eq!(word, 0);
        assert_eq!(child.wait().expect("wait"), Ending::Killed(signal.as_raw()));
    }
}
