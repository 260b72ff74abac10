//! `salp run` and `salp console` at a terminal: each key goes to the guest, Ctrl-] leaves it running, and the
//! terminal is what it was, whatever ends them. What nobody has left ends with whoever shows it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use salp_tests::images::{ECHO, EXIT_7, bare_image};
use salp_tests::procs::{children, entries, settled};
use salp_tests::user::{User, signal};

const LIMIT: Duration = Duration::from_secs(30);

/// A terminal with a program in its foreground.
struct Terminal {
    keyboard: File,
    line: File,
    child: Child,
    said: Vec<u8>,
}

impl Terminal {
    /// None: setsid(1) cannot give a program a terminal here.
    fn start(test: &str, user: &User, arguments: &[&str]) -> Option<Self> {
        let keyboard = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC);
        let keyboard = keyboard.expect("a terminal");
        grantpt(&keyboard).expect("it is ours");
        unlockpt(&keyboard).expect("it is ours");
        let name = ptsname(&keyboard, Vec::new()).expect("a name");
        let name = name.to_str().expect("text").to_owned();
        let line = OpenOptions::new().read(true).write(true).open(name).expect("it is there");
        let end = || Stdio::from(line.try_clone().expect("a descriptor"));
        let salp = user.command(arguments);
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait"]).arg(salp.get_program()).args(salp.get_args());
        for (name, value) in salp.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.current_dir(user.scratch.path()).stdin(end()).stdout(end()).stderr(end());
        match command.spawn() {
            Ok(child) => Some(Self { keyboard: keyboard.into(), line, child, said: Vec::new() }),
            Err(error) => {
                println!("SKIPPED: {test}: setsid(1): {error}");
                None
            }
        }
    }

    fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.line).expect("a terminal").local_modes;
        !modes.intersects(LocalModes::ICANON | LocalModes::ISIG | LocalModes::ECHO)
    }

    fn press(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).expect("it is read");
    }

    /// Reads until `word` is there.
    #[track_caller]
    fn await_text(&mut self, word: &str) {
        let limit = Timespec::try_from(LIMIT).expect("seconds");
        while !String::from_utf8_lossy(&self.said).contains(word) {
            let mut chunk = [0; 256];
            let ready = poll(&mut [PollFd::new(&self.keyboard, PollFlags::IN)], Some(&limit));
            assert_eq!(ready, Ok(1), "no {word:?} in {:?}", String::from_utf8_lossy(&self.said));
            let count = self.keyboard.read(&mut chunk).expect("it is open here");
            self.said.extend(&chunk[..count]);
        }
    }

    /// Returns the terminal.
    fn end(mut self, status: i32) -> Self {
        let ended = settled(LIMIT, || self.child.try_wait().expect("it is ours"), Option::is_some);
        assert_eq!(
            ended.and_then(|ended| ended.code()),
            Some(status),
            "{}",
            String::from_utf8_lossy(&self.said)
        );
        let modes = tcgetattr(&self.line).expect("a terminal").local_modes;
        assert!(
            modes.contains(LocalModes::ICANON | LocalModes::ISIG | LocalModes::ECHO),
            "it stays {modes:?}"
        );
        self
    }
}

#[test]
fn keys_go_to_the_guest_until_the_leave_key() {
    let test = "terminal-keys";
    let Some(user) = User::new(test) else { return };
    let kernel = user.file("echo", &bare_image(ECHO));
    let run = ["run", "--memory", "16M", "--name", "a", "--kernel", &kernel];
    let Some(mut run) = Terminal::start(test, &user, &run) else { return };
    run.await_text("a runs: `salp fork a` clones it, Ctrl-] leaves it running");
    assert!(run.is_raw());
    // Ctrl-C and Ctrl-D are keys as others are.
    run.press(b"one\x03\x04two");
    run.await_text("one\x03\x04two");
    user.succeed(&["fork", "a", "--name", "b"]);
    let mut console = Terminal::start(test, &user, &["console", "b"]).expect("as before");
    console.await_text("this is the console of b; Ctrl-] leaves it");
    console.press(b"three");
    console.await_text("three");
    assert!(console.is_raw());
    console.press(b"\x1d");
    console.end(0);
    assert_eq!(user.vm("b")["state"], "running");
    assert_eq!((user.console("a").as_str(), user.console("b").as_str()), ("one\x03\x04two", "three"));
    user.succeed(&["stop", "b"]);
    user.succeed(&["stop", "a"]);
    run.await_text("salp: a was stopped");
    run.end(143);
    std::fs::remove_file(kernel).expect("it is ours");
    user.end();
}

/// Whether a process has the terminal open.
fn holds(pid: u64, terminal: &Terminal) -> bool {
    let end = std::fs::read_link(format!("/proc/self/fd/{}", terminal.line.as_raw_fd())).expect("it is open");
    let descriptors = format!("/proc/{pid}/fd");
    let names = entries(&descriptors);
    assert!(!names.is_empty(), "{pid} is there");
    names.iter().any(|name| std::fs::read_link(format!("{descriptors}/{name}")).is_ok_and(|to| to == end))
}

#[test]
fn a_run_that_is_left_goes_on_and_can_be_come_back_to() {
    let test = "terminal-left";
    let Some(user) = User::new(test) else { return };
    let kernel = user.file("echo", &bare_image(ECHO));
    let run = ["run", "--memory", "16M", "--name", "a", "--kernel", &kernel];
    let Some(mut run) = Terminal::start(test, &user, &run) else { return };
    run.await_text("Ctrl-] leaves it running");
    run.press(b"one");
    run.await_text("one");
    run.press(b"\x1d");
    run.await_text("a runs on: `salp console a` comes back to it, `salp stop a` ends it");
    let line = run.end(0);
    let vm = user.vm("a");
    assert_eq!(vm["state"], "running");
    for process in ["pid", "keeper_pid"] {
        assert!(!holds(vm[process].as_u64().expect("a number"), &line), "the {process} has the terminal");
    }
    drop(line);
    let mut console = Terminal::start(test, &user, &["console", "a"]).expect("as before");
    console.await_text("one");
    console.press(b"two");
    console.await_text("onetwo");
    console.press(b"\x1d");
    console.end(0);
    user.succeed(&["stop", "a"]);
    // Ctrl-C is the terminal's where the guest reads nothing.
    let mut run =
        Terminal::start(test, &user, &["run", "--memory", "16M", "--name", "b"]).expect("as before");
    run.await_text("b runs: `salp fork b` clones it, Ctrl-C ends it, Ctrl-] leaves it running");
    run.press(b"lost\x1d");
    run.await_text("b runs on");
    run.end(0);
    assert_eq!(user.vm("b")["state"], "running");
    let mut run =
        Terminal::start(test, &user, &["run", "--memory", "16M", "--name", "c"]).expect("as before");
    run.await_text("leaves it running");
    run.press(b"\x03");
    run.await_text("interrupted, everything is ended");
    run.end(130);
    assert_eq!(user.succeed(&["ps", "-q"]), "b\n");
    user.succeed(&["stop", "b"]);
    std::fs::remove_file(kernel).expect("it is ours");
    user.end();
}

#[test]
fn what_nobody_has_left_ends_with_its_terminal() {
    let test = "terminal-gone";
    let Some(user) = User::new(test) else { return };
    let run = ["run", "--memory", "16M", "--name", "a"];
    let Some(mut run) = Terminal::start(test, &user, &run) else { return };
    run.await_text("leaves it running");
    signal(salp_of(&run), Signal::KILL);
    run.child.wait().expect("it is ours");
    let nobody = |user: &User| settled(LIMIT, || user.ps(), Vec::is_empty);
    assert!(nobody(&user).is_empty(), "it runs on after a kill");
    let mut run =
        Terminal::start(test, &user, &["run", "--memory", "16M", "--name", "a"]).expect("as before");
    run.await_text("leaves it running");
    let Terminal { keyboard, mut child, .. } = run;
    drop(keyboard);
    child.wait().expect("it is ours");
    assert!(nobody(&user).is_empty(), "it runs on without a terminal");
    user.end();
}

#[test]
fn clones_of_a_run_that_has_ended_can_be_left() {
    let test = "terminal-clones";
    let Some(user) = User::new(test) else { return };
    // All that it says is shown, however soon it ends.
    let run = ["run", "--memory", "16M", "--name", "a", "--cmdline", "case=idle us=1 rounds=1 say=1"];
    let Some(mut run) = Terminal::start(test, &user, &run) else { return };
    run.await_text("vm 1 round 1");
    run.end(0);
    let run = ["run", "--memory", "16M", "--name", "a", "--cmdline", "case=idle us=100000 rounds=30"];
    let mut run = Terminal::start(test, &user, &run).expect("as before");
    run.await_text("leaves it running");
    user.succeed(&["fork", "a", "--paused"]);
    run.await_text("a ended with 0; its clones go on");
    assert!(!run.is_raw());
    run.press(b"\x1d");
    run.await_text("the clones of a run on");
    run.end(0);
    assert_eq!(user.vm("a-1")["state"], "paused");
    user.succeed(&["stop", "a-1"]);
    user.end();
}

/// The process that setsid(1) has started.
fn salp_of(terminal: &Terminal) -> u32 {
    let pid = terminal.child.id();
    assert!(children().contains(&pid));
    // In a session of its own already, it has become the program; otherwise it has a child.
    let task = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let first = task.split_whitespace().next().and_then(|child| child.parse().ok());
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    if name.trim() == "salp" { pid } else { first.expect("a child") }
}

#[test]
fn whatever_ends_it_the_terminal_is_what_it_was() {
    let test = "terminal-ends";
    let Some(user) = User::new(test) else { return };
    let kernel = user.file("echo", &bare_image(ECHO));
    for (number, status) in [(Signal::TERM, 143), (Signal::HUP, 129), (Signal::QUIT, 131)] {
        let run = ["run", "--memory", "16M", "--name", "a", "--kernel", &kernel];
        let Some(mut run) = Terminal::start(test, &user, &run) else { return };
        run.await_text("leaves it running");
        let mut console = Terminal::start(test, &user, &["console", "a"]).expect("as before");
        console.await_text("leaves it");
        settled(LIMIT, || console.is_raw() && run.is_raw(), |is_raw| *is_raw);
        assert!(console.is_raw() && run.is_raw());
        signal(salp_of(&console), number);
        console.end(status);
        signal(salp_of(&run), number);
        run.end(status);
    }
    let exit = user.file("exit", &bare_image(EXIT_7));
    let run = ["run", "--memory", "16M", "--name", "a", "--kernel", &exit];
    Terminal::start(test, &user, &run).expect("as before").end(7);
    for file in [kernel, exit] {
        std::fs::remove_file(file).expect("it is ours");
    }
    user.end();
}
