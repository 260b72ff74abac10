//! What those who listen are told of buffers that guests keep pinned: enough, and not too much.

use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use salp::control::client::Client;
use salp::control::events::{Event, What};
use salp::control::place::Place;
use salp_tests::images::bare_image;
use salp_tests::procs::{settled, switches};
use salp_tests::user::User;

const LIMIT: Duration = Duration::from_secs(60);
/// How long a keeper does not wake, whatever its guest registers.
const IDLE: Duration = Duration::from_secs(1);

/// Registers two pages at 4 MiB and lets them go again, for ever.
const FLOOD: &[u8] = &[
    0x48, 0xbb, 0x00, 0x00, 0x00, 0xd0, 0x00, 0x00, 0x00, 0x00, // mov rbx, 0xd0000000
    0x48, 0xc7, 0x43, 0x40, 0x00, 0x00, 0x40, 0x00, // mov qword [rbx + 0x40], 0x400000
    0x48, 0xc7, 0x43, 0x48, 0x00, 0x20, 0x00, 0x00, // mov qword [rbx + 0x48], 0x2000
    0x48, 0xc7, 0x43, 0x50, 0x00, 0x00, 0x00, 0x00, // again: mov qword [rbx + 0x50], 0
    0x48, 0xc7, 0x43, 0x58, 0x00, 0x00, 0x00, 0x00, // mov qword [rbx + 0x58], 0
    0xeb, 0xee, // jmp again
];

/// Buffers registered, unregistered, held, and pages held, of a VM.
type Told = (String, [u32; 4]);

/// One who hears of pins until nobody listens to it, or the colony ends.
fn listen(user: &User, name: &str) -> (Receiver<Told>, JoinHandle<()>) {
    let (client, name) = (Client::new(Place::at(user.place())), name.to_owned());
    let (tell, told) = channel();
    let (ready, is_ready) = channel();
    let hear = move |event: Event| {
        let is_heard = match event.what {
            What::Listening => ready.send(()).is_ok(),
            What::Pins { vm, registered, unregistered, buffers, pages } => {
                tell.send((vm.name, [registered, unregistered, buffers, pages])).is_ok()
            }
            _ => true,
        };
        if is_heard { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    };
    let listener = std::thread::spawn(move || client.events(&name, hear).expect("a colony"));
    is_ready.recv_timeout(LIMIT).expect("it listens");
    (told, listener)
}

/// Adds up what is told of a VM until it has `held` buffers and pages and so many were registered.
#[track_caller]
fn sum_until(told: &Receiver<Told>, name: &str, held: [u32; 2], least: u32) -> [u32; 2] {
    let mut sum = [0, 0];
    loop {
        let (vm, [registered, unregistered, buffers, pages]) = told.recv_timeout(LIMIT).expect("it is told");
        assert_eq!(vm, name);
        sum = [sum[0] + registered, sum[1] + unregistered];
        if [buffers, pages] == held && sum[0] >= least {
            return sum;
        }
    }
}

#[test]
fn buffers_that_stay_pinned_are_told_of() {
    let Some(user) = User::new("events-pins") else { return };
    user.run_with("a", &["--cmdline", "case=dma pins=24 mib=2"]);
    // Whatever is registered before is no news.
    let stats = || -> serde_json::Value {
        serde_json::from_str(&user.succeed(&["stats", "a", "--json"])).expect("json")
    };
    let pins = |stats: &serde_json::Value| stats[0]["pins"].as_u64().or(stats["pins"].as_u64()).unwrap_or(0);
    assert!(pins(&settled(LIMIT, stats, |stats| pins(stats) >= 24)) >= 24, "{}", stats());
    let (told, listener) = listen(&user, "a");
    // A clone's devices pin the buffers again.
    user.succeed(&["fork", "a"]);
    assert_eq!(sum_until(&told, "a-1", [1, 24], 1), [1, 0]);
    // After a reset too, with what they had let go.
    user.succeed(&["reset", "a-1"]);
    assert_eq!(sum_until(&told, "a-1", [1, 24], 1), [1, 1]);
    user.succeed(&["stop", "--all"]);
    listener.join().expect("it ends with the colony");
    assert_eq!(told.try_iter().count(), 0, "an end is told as an end");
    user.end();
}

#[test]
fn a_guest_that_registers_for_ever_wakes_its_keeper_for_those_who_listen_alone() {
    let Some(user) = User::new("events-flood") else { return };
    let kernel = user.file("flood", &bare_image(FLOOD));
    user.run_with("a", &["--kernel", &kernel]);
    let (told, listener) = listen(&user, "a");
    let heard: Vec<_> = (0..5).map(|_| told.recv_timeout(LIMIT).expect("it is told").1).collect();
    for [registered, unregistered, buffers, pages] in &heard {
        assert!(registered.abs_diff(*unregistered) <= 1 && *buffers <= 1 && *pages <= 2, "{heard:?}");
    }
    // The first comes at once.
    assert!(heard[1..].iter().all(|[registered, ..]| *registered > 1), "one each: {heard:?}");
    drop(told);
    listener.join().expect("it has heard enough");
    let keeper = user.keeper("a");
    let woken = || {
        let before = switches(keeper);
        std::thread::sleep(IDLE);
        switches(keeper).abs_diff(before)
    };
    assert_eq!(settled(LIMIT, woken, |woken| *woken == 0), 0, "the keeper wakes, and nobody listens");
    user.succeed(&["stop", "a"]);
    std::fs::remove_file(kernel).expect("it is ours");
    user.end();
}
