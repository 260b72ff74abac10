//! A user of the commands: the real binary, each command a process of its own, in a directory of sockets
//! that nobody else has.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::GuestKind;
use crate::procs::{MARK, Scratch, expect_nothing_left, expect_refusal, marked, salp_binary, settled};
use crate::world::can_run;

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A user with a directory of sockets of their own.
pub struct User {
    /// Where it all happens.
    pub scratch: Scratch,
    mark: String,
}

impl User {
    /// None: the host cannot run a VM.
    #[must_use]
    pub fn new(test: &str) -> Option<Self> {
        can_run(test, GuestKind::Kvm).then(|| Self::of_any_host(test))
    }

    /// A user, whatever the host can run.
    #[must_use]
    pub fn of_any_host(test: &str) -> Self {
        Self { scratch: Scratch::new(test), mark: format!("{test}-{}", std::process::id()) }
    }

    /// A command of this user's.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(salp_binary());
        command.args(arguments).env(MARK, &self.mark).env("TMPDIR", self.scratch.path());
        command.env_remove("XDG_RUNTIME_DIR").current_dir(self.scratch.path()).stdin(Stdio::null());
        command
    }

    /// A demo of a second or so, whose table nobody reads.
    pub fn demo(&self) -> Command {
        let mut command = self.command(&["demo", "--memory", "64M", "--clones", "3", "--dirty", "32M"]);
        command.stdout(Stdio::null());
        command
    }

    /// What a command puts out.
    pub fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("salp starts")
    }

    /// What a command prints that must succeed and say nothing else.
    pub fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{arguments:?}: {} {said}", output.status);
        String::from_utf8(output.stdout).expect("text")
    }

    /// Fails, saying one line in which all of `words` are.
    pub fn fail(&self, arguments: &[&str], status: i32, words: &[&str]) {
        expect_refusal(&self.output(arguments), status, words);
    }

    /// A VM in the background.
    pub fn run(&self, name: &str, command_line: &str) {
        self.run_with(name, &["--cmdline", command_line]);
    }

    /// A VM in the background, with these options.
    pub fn run_with(&self, name: &str, options: &[&str]) {
        let arguments = [&["run", "--detach", "--memory", "32M", "--name", name], options].concat();
        assert_eq!(self.succeed(&arguments), format!("{name}\n"));
    }

    /// A VM in the foreground, running.
    pub fn start(&self, name: &str, command_line: &str) -> Child {
        self.start_with(name, &["--cmdline", command_line])
    }

    /// A VM in the foreground, running, with these options.
    pub fn start_with(&self, name: &str, options: &[&str]) -> Child {
        let mut command = self.command(&[&["run", "--memory", "32M", "--name", name], options].concat());
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = piped.spawn().expect("salp starts");
        let mut line = String::new();
        let mut from = BufReader::new(child.stderr.take().expect("it is piped"));
        from.read_line(&mut line).expect("it says that it runs");
        assert!(line.contains(&format!("{name} runs")), "{line}");
        child.stderr = Some(from.into_inner());
        child
    }

    /// What `salp ps` lists.
    pub fn ps(&self) -> Vec<Value> {
        match serde_json::from_str(&self.succeed(&["ps", "--json"])).expect("json") {
            Value::Array(vms) => vms,
            other => panic!("no list: {other}"),
        }
    }

    /// What `salp ps` says of a VM.
    pub fn vm(&self, name: &str) -> Value {
        let found = self.ps().into_iter().find(|vm| vm["name"] == name);
        found.unwrap_or_else(|| panic!("no {name}"))
    }

    /// The process of a VM's colony.
    pub fn keeper(&self, name: &str) -> u32 {
        let pid = self.vm(name)["keeper_pid"].as_u64().expect("a number");
        u32::try_from(pid).expect("a process's number")
    }

    /// The lines that a VM's console file has.
    pub fn lines(&self, name: &str) -> Vec<String> {
        let path = PathBuf::from(self.vm(name)["console"].as_str().expect("a path"));
        fs::read_to_string(path).expect("the console's file").lines().map(str::to_owned).collect()
    }

    /// The directory of sockets.
    pub fn place(&self) -> PathBuf {
        self.scratch.path().join(format!("salp-{}", rustix::process::geteuid().as_raw()))
    }

    /// A file of this user's.
    pub fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.scratch.path().join(name);
        fs::write(&path, bytes).expect("room for a file");
        path.to_string_lossy().into_owned()
    }

    /// What a VM's console file has.
    pub fn console(&self, name: &str) -> String {
        let path = PathBuf::from(self.vm(name)["console"].as_str().expect("a path"));
        String::from_utf8_lossy(&fs::read(path).expect("the console's file")).into_owned()
    }

    /// Waits until a VM's console file is as it should be.
    #[track_caller]
    pub fn await_console(&self, name: &str, is: impl Fn(&str) -> bool) -> String {
        let text = settled(LIMIT, || self.console(name), |text| is(text));
        assert!(is(&text), "{name} says {text:?}");
        text
    }

    /// The processes of this user's commands.
    #[must_use]
    pub fn processes(&self) -> BTreeSet<u32> {
        marked(MARK, &self.mark)
    }

    /// Checks that nothing is left.
    pub fn end(self) {
        expect_nothing_left(&self.mark, &self.scratch);
    }
}

impl Drop for User {
    /// A test that failed leaves no VM behind either. After [`end`](User::end) there is none.
    fn drop(&mut self) {
        for pid in self.processes() {
            let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
            // A member that went with its keeper is gone already.
            let _ = pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL));
        }
    }
}

/// Sends a signal.
///
/// # Panics
/// There is no such process.
pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("a process's number"));
    rustix::process::kill_process(pid.expect("not 0"), signal).expect("it exists");
}
