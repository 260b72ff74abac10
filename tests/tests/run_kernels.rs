//! `salp run --kernel` with images of a few instructions, as users see it: output, input, forks from
//! other processes, and every way in which a guest ends.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Output, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use salp_tests::images::{
    BREAKPOINT, COUNTER, DOT_AND_FAULT, DOT_AND_HALT, ECHO, EXIT_7, HALT, OBEDIENT, PROMPT, PVH_REPORT,
    RESET, RESET_BY_CHIPSET, TRIPLE_FAULT, WAIT, bare_image, counts, image, pvh_note,
};
use salp_tests::procs::{entries, settled};
use salp_tests::user::{User, signal};

const LIMIT: Duration = Duration::from_secs(30);

/// Lines that a VM prints from now on count up, and are its own.
#[track_caller]
fn expect_counting(user: &User, name: &str) -> Vec<u32> {
    let before = counts(&user.console(name)).len();
    let said = counts(&user.await_console(name, |text| counts(text).len() >= before + 3));
    assert!(said.windows(2).all(|pair| pair[1] == pair[0] + 1), "{name} counts {said:?}");
    said
}

#[test]
fn a_bare_image_is_forked_by_another_process() {
    let Some(user) = User::new("kernel-fork") else { return };
    let kernel = user.file("counter", &bare_image(COUNTER));
    let child = user.start_with("a", &["--kernel", &kernel]);
    let root = expect_counting(&user, "a");
    assert_eq!(root[0], 1);
    user.succeed(&["fork", "a", "--name", "b"]);
    let clone = expect_counting(&user, "b");
    user.succeed(&["fork", "b", "--name", "c"]);
    let clone_of_clone = expect_counting(&user, "c");
    // Each goes on from the count in its own memory, and so do their sources.
    assert!(clone[0] > 3 && clone_of_clone[0] > clone[2], "{clone:?} {clone_of_clone:?}");
    expect_counting(&user, "a");
    expect_counting(&user, "b");
    for name in ["a", "c", "b"] {
        user.succeed(&["stop", name]);
    }
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(143));
    assert!(counts(&String::from_utf8_lossy(&output.stdout)).len() >= 6, "the terminal has the output");
    std::fs::remove_file(kernel).expect("it is ours");
    user.end();
}

/// Runs an image in the foreground to its end.
fn run(user: &User, code: &[u8]) -> Output {
    let kernel = user.file("kernel", &bare_image(code));
    let output = user.output(&["run", "--memory", "16M", "--name", "x", "--kernel", &kernel]);
    std::fs::remove_file(kernel).expect("it is ours");
    output
}

#[test]
fn the_exit_status_tells_how_the_guest_ended() {
    let Some(user) = User::new("kernel-ends") else { return };
    let crash: &[&str] = &["x crashed: vcpu 0: ", "  rip 0000000000200000 ", "  at rip: ["];
    let cases: [(&[u8], i32, &[&str]); 7] = [
        (HALT, 0, &["x has halted"]),
        (DOT_AND_HALT, 0, &["x has halted"]),
        (RESET, 0, &["x was reset by its guest"]),
        (RESET_BY_CHIPSET, 0, &["x was reset by its guest"]),
        (EXIT_7, 7, &["x ended with 7"]),
        (TRIPLE_FAULT, 134, crash),
        (BREAKPOINT, 134, crash),
    ];
    for (code, status, words) in cases {
        let output = run(&user, code);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{said}");
        for word in words {
            assert!(said.contains(word), "no {word:?} in {said}");
        }
        assert_eq!(output.stdout, if code == DOT_AND_HALT { &b"."[..] } else { b"" });
    }
    user.end();
}

#[test]
fn a_guest_that_ends_is_listed_so_and_its_family_goes_on() {
    let Some(user) = User::new("kernel-family") else { return };
    let kernel = user.file("obedient", &bare_image(OBEDIENT));
    user.run_with("a", &["--kernel", &kernel]);
    user.succeed(&["fork", "a", "-n", "4"]);
    let ways =
        [("a-1", b"h", "halted"), ("a-2", b"r", "reset"), ("a-3", b"u", "crashed"), ("a-4", b"b", "crashed")];
    for (name, letter, how) in ways {
        assert_eq!(post(&user, name, letter), "{\"accepted_bytes\":1}");
        let vm = settled(LIMIT, || user.vm(name), |vm| vm["state"] == "ended");
        assert_eq!((vm["state"].as_str(), vm["how"].as_str()), (Some("ended"), Some(how)), "{vm}");
        let table = user.succeed(&["ps"]);
        assert!(table.lines().any(|line| line.starts_with(name) && line.contains(how)), "{table}");
        user.fail(&["fork", name], 1, &[name, "does not run any more", how]);
        assert!(
            how != "crashed" || vm["text"].as_str().is_some_and(|text| text.contains("at rip: [")),
            "{vm}"
        );
    }
    post(&user, "a", b"on");
    user.await_console("a", |text| text == "on");
    user.succeed(&["fork", "a", "--name", "b"]);
    user.succeed(&["stop", "a"]);
    user.succeed(&["stop", "b"]);
    std::fs::remove_file(kernel).expect("it is ours");
    user.end();
}

#[test]
fn an_image_that_asks_for_pvh_gets_it() {
    let Some(user) = User::new("kernel-pvh") else { return };
    // Its 64-bit entry is not even in the image.
    let kernel = user.file("pvh", &image(PVH_REPORT, 0, &pvh_note(2 << 20)));
    let initrd = user.file("initrd", b"Z and more");
    let arguments = ["run", "--memory", "16M", "--kernel", &kernel, "--cmdline", "hello"];
    for (initrd, said) in [(None, "hello3"), (Some(initrd.as_str()), "helloZ3")] {
        let options = initrd.map(|initrd| ["--initrd", initrd]);
        let output = user.output(&[&arguments[..], options.as_ref().map_or(&[], |it| it)].concat());
        assert_eq!(String::from_utf8_lossy(&output.stdout), said, "{output:?}");
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    }
    // Linux has both, and gets the other.
    let mut notes = pvh_note(2 << 20);
    notes.extend([6_u32, 4, 0x101].into_iter().flat_map(u32::to_le_bytes));
    notes.extend(b"Linux\0\0\0\0\0\0\0");
    let linux = user.file("linux", &image(EXIT_7, 2 << 20, &notes));
    let output = user.output(&["run", "--memory", "16M", "--kernel", &linux]);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    for file in [kernel, initrd, linux] {
        std::fs::remove_file(file).expect("it is ours");
    }
    user.end();
}

/// The body of the answer to input that is sent over the socket.
#[track_caller]
fn post(user: &User, name: &str, input: &[u8]) -> String {
    let socket = user.place().join(format!("colony-{}.sock", user.keeper(name)));
    let mut stream = UnixStream::connect(socket).expect("it listens");
    let length = input.len();
    let head = format!(
        "POST /v1/vms/{name}/console HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
    );
    stream.write_all(&[head.as_bytes(), input].concat()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    answer.split("\r\n\r\n").nth(1).unwrap_or_default().to_owned()
}

#[test]
fn what_is_typed_reaches_the_guest_in_order() {
    let Some(user) = User::new("kernel-input") else { return };
    let kernel = user.file("echo", &bare_image(ECHO));
    let mut child = user.start_with("a", &["--kernel", &kernel]);
    let mut input = child.stdin.take().expect("it is piped");
    input.write_all(b"from run\n").expect("it reads");
    user.await_console("a", |text| text == "from run\n");
    // The clone's input is its own.
    user.succeed(&["fork", "a", "--name", "b"]);
    let mut console = user.command(&["console", "b"]);
    let mut console = console.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("salp starts");
    // More than the port and what waits behind it hold.
    let long: String = (0..3000).map(|number| format!("{number}\n")).collect();
    let mut typed = console.stdin.take().expect("it is piped");
    typed.write_all(long.as_bytes()).expect("it reads");
    drop(typed);
    user.await_console("b", |text| text.len() >= long.len());
    assert!(user.console("b") == long, "some of it is lost, or in disorder");
    drop(input);
    assert_eq!(user.console("a"), "from run\n");
    user.succeed(&["stop", "b"]);
    let output = console.wait_with_output().expect("it ends");
    assert!(output.status.success() && output.stdout == long.as_bytes());
    user.succeed(&["stop", "a"]);
    child.wait().expect("it ends");
    std::fs::remove_file(kernel).expect("it is ours");
    user.end();
}

#[test]
fn a_guest_that_reads_nothing_takes_so_much_and_no_more() {
    let Some(user) = User::new("kernel-deaf") else { return };
    let kernel = user.file("prompt", &bare_image(PROMPT));
    user.run_with("a", &["--kernel", &kernel]);
    user.await_console("a", |text| text == "?");
    assert_eq!(post(&user, "a", &[b'x'; 5000]), "{\"accepted_bytes\":4096}");
    assert_eq!(post(&user, "a", b"x"), "{\"accepted_bytes\":64}".replace("64", "1"));
    let rest = post(&user, "a", &[b'x'; 100]);
    assert_eq!(rest, "{\"accepted_bytes\":63}");
    assert_eq!(post(&user, "a", b"x"), "{\"accepted_bytes\":0}");
    user.succeed(&["fork", "a", "--name", "b"]);
    assert_eq!(post(&user, "b", b"x"), "{\"accepted_bytes\":0}", "unread input is part of the cut");
    user.succeed(&["stop", "a"]);
    user.succeed(&["stop", "b"]);
    std::fs::remove_file(kernel).expect("it is ours");
    user.end();
}

#[test]
fn bad_files_are_refused_in_one_line() {
    let Some(user) = User::new("kernel-bad") else { return };
    let good = bare_image(COUNTER);
    let with = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    let bad: [(&str, Vec<u8>, &[&str]); 6] = [
        ("script", b"#!/bin/sh\n".to_vec(), &["neither an ELF file nor a bzImage"]),
        ("short", good[..good.len() - 1].to_vec(), &["truncated", "a segment"]),
        ("narrow", with(4, &[1]), &["32-bit"]),
        ("dynamic", with(16, &3_u16.to_le_bytes()), &["dynamically linked"]),
        ("foreign", with(18, &183_u16.to_le_bytes()), &["machine 183"]),
        ("large", with(64 + 40, &(64_u64 << 20).to_le_bytes()), &["RAM for it", "0x2000000"]),
    ];
    for (name, image, words) in bad {
        let path = user.file(name, &image);
        let words = [words, &["--kernel", name]].concat();
        for how in
            [&["run", "--memory", "32M", "--kernel", &path][..], &["run", "--detach", "--kernel", &path]]
        {
            // The default memory has room for what is too large for less.
            if name != "large" || !how.contains(&"--detach") {
                user.fail(how, 1, &words);
            }
        }
        std::fs::remove_file(path).expect("it is ours");
    }
    let (kernel, initrd) = (user.file("good", &good), user.file("initrd", &vec![0; 32 << 20]));
    let (run, long) = (["run", "--memory", "32M", "--kernel", &kernel], "x".repeat(2048));
    user.fail(&[&run[..], &["--initrd", &initrd]].concat(), 1, &["the initrd has 33554432 bytes"]);
    user.fail(&[&run[..], &["--initrd", "absent"]].concat(), 1, &["--initrd absent", "No such file"]);
    user.fail(&[&run[..], &["--initrd", "/dev"]].concat(), 1, &["--initrd /dev", "no regular file"]);
    user.fail(&[&run[..], &["--cmdline", &long]].concat(), 1, &["command line has 2048 bytes", "2047"]);
    user.fail(&["run", "--kernel", "absent"], 1, &["--kernel absent", "No such file"]);
    user.fail(&["run", "--initrd", &initrd], 2, &["--kernel"]);
    for file in [kernel, initrd] {
        std::fs::remove_file(file).expect("it is ours");
    }
    user.end();
}

#[test]
fn a_detached_vm_that_fails_at_once_leaves_a_trace() {
    let Some(user) = User::new("kernel-trace") else { return };
    let kernel = user.file("fault", &bare_image(DOT_AND_FAULT));
    user.run_with("a", &["--kernel", &kernel]);
    let ps = settled(LIMIT, || user.output(&["ps"]), |output| !output.stderr.is_empty());
    let said = String::from_utf8_lossy(&ps.stderr);
    for word in ["salp: a crashed: vcpu 0: ", "at rip: [", "its last output was:\n."] {
        assert!(said.contains(word), "no {word:?} in {said}");
    }
    // It is said once.
    assert_eq!(user.ps(), Vec::<serde_json::Value>::new());
    user.fail(&["console", "a"], 1, &["no vm is called a"]);
    std::fs::remove_file(kernel).expect("it is ours");
    user.end();
}

#[test]
fn a_keeper_that_does_not_answer_is_named() {
    let Some(user) = User::new("kernel-frozen") else { return };
    let kernel = user.file("wait", &bare_image(WAIT));
    user.run_with("a", &["--kernel", &kernel]);
    user.run_with("b", &["--kernel", &kernel]);
    let keeper = user.keeper("a");
    signal(keeper, Signal::STOP);
    let says = format!("the keeper {keeper} does not answer within 5 s");
    user.fail(&["console", "a"], 1, &[&says]);
    let ps = user.output(&["ps"]);
    let (listed, said) = (String::from_utf8_lossy(&ps.stdout), String::from_utf8_lossy(&ps.stderr));
    assert!(ps.status.code() == Some(1) && said.contains(&says), "{ps:?}");
    assert!(listed.lines().count() == 2 && listed.contains("b     1 "), "{listed}");
    signal(keeper, Signal::CONT);
    assert_eq!(user.ps().len(), 2);
    user.succeed(&["stop", "a"]);
    user.succeed(&["stop", "b"]);
    std::fs::remove_file(kernel).expect("it is ours");
    user.end();
}

/// How often the threads of these processes have gone to sleep.
fn switches(pids: &[u64]) -> u64 {
    let texts = pids.iter().flat_map(|pid| {
        let tasks = entries(&format!("/proc/{pid}/task")).into_iter();
        tasks.filter_map(move |task| std::fs::read_to_string(format!("/proc/{pid}/task/{task}/status")).ok())
    });
    let count = |text: String| {
        let lines = text.lines().filter(|line| line.contains("voluntary_ctxt_switches"));
        lines.filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok()).sum::<u64>()
    };
    texts.map(count).sum()
}

#[test]
fn a_guest_that_waits_uses_no_processor() {
    let Some(user) = User::new("kernel-idle") else { return };
    let kernel = user.file("wait", &bare_image(WAIT));
    user.run_with("a", &["--kernel", &kernel]);
    user.succeed(&["fork", "a"]);
    let pids: Vec<_> = user.ps().iter().filter_map(|vm| vm["pid"].as_u64()).collect();
    assert_eq!(pids.len(), 2);
    // It is looked at once after its start, and never again.
    let still = || {
        let before = switches(&pids);
        std::thread::sleep(Duration::from_secs(2));
        switches(&pids) - before
    };
    assert_eq!(settled(LIMIT, still, |switched| *switched == 0), 0, "threads of an idle VM wake");
    user.succeed(&["stop", "a"]);
    user.succeed(&["stop", "a-1"]);
    std::fs::remove_file(kernel).expect("it is ours");
    user.end();
}
