//! The benchmark works: every benchmark gives its records, of salp and of every baseline, they
//! parse, and there is a report. Nothing here looks at how long anything took.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

use salp::bench::report::{self, Record};
use salp::kvm::Kvm;
use salp::window::Userfault;
use salp_tests::procs::salp_binary;

/// Of each guest: with KVM all takes longer.
const RUNS_OF_KVM: usize = 1;
const RUNS_OF_THREADS: usize = 2;
const BASELINES: [&str; 4] = ["full_copy", "process_fork", "static_template", "snapshot"];
const CROWDS: [&str; 2] = ["process_fork", "static_template"];
const COMPARED: [&str; 8] = [
    "fork_call",
    "pause",
    "first_instruction",
    "first_mib",
    "first_read_page",
    "first_write_leaf",
    "first_write_page",
    "fresh_write_page",
];
/// With many clones at once.
const OF_CROWDS: [&str; 4] = ["burst_4", "marginal_idle", "marginal_active", "mappings"];
const SALPS_ALONE: [&str; 14] = [
    "first_read_page_at_once",
    "first_write_page_at_once",
    "pin_copy_page",
    "pin_pause",
    "scattered_pause",
    "scattered_call",
    "published_leaf",
    "published_page",
    "chain_call",
    "chain_pause",
    "call_of_many",
    "calls_4",
    "pause_of_many",
    "stage.protect",
];

/// Where the records go; removed when dropped.
struct Outputs {
    json: PathBuf,
    csv: PathBuf,
    report: PathBuf,
}

impl Outputs {
    fn new(guest: &str) -> Self {
        let name = |kind: &str| format!("salp-bench-{}-{guest}.{kind}", std::process::id());
        let [json, csv, report] = ["json", "csv", "html"].map(|kind| std::env::temp_dir().join(name(kind)));
        Self { json, csv, report }
    }
}

impl Drop for Outputs {
    fn drop(&mut self) {
        for path in [&self.json, &self.csv, &self.report] {
            // Not there where the test failed before.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Has salp measure little of all, and returns what it says.
fn measure(guest: &str, runs: usize, outputs: &Outputs) -> String {
    let run = Command::new(salp_binary())
        .args(["bench", "all", "--memory", "16M", "--dirty", "all", "--huge", "on,off", "--pins", "0,8"])
        .args(["--burst", "4", "--alive", "2", "--window", "20"])
        .args(["--runs", &runs.to_string(), "--guest", guest])
        .arg("--json")
        .arg(&outputs.json)
        .arg("--csv")
        .arg(&outputs.csv)
        .arg("--report")
        .arg(&outputs.report)
        .output()
        .expect("the program starts");
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "it ends with {}: {said}", run.status);
    String::from_utf8_lossy(&run.stdout).into_owned()
}

fn check(guest: &str, runs: usize) {
    let outputs = Outputs::new(guest);
    let table = measure(guest, runs, &outputs);
    let text = std::fs::read_to_string(&outputs.json).expect("the records are there");
    let (records, host) = report::from_json(&text).expect("they are JSON");
    assert!(host["host"]["kernel_release"].is_string(), "{host}");
    assert!(!host["arenas"].as_array().expect("a list").is_empty(), "{host}");
    assert_eq!(host["skipped"], serde_json::json!([]));
    records.iter().for_each(|record| check_record(record, runs));
    check_who_is_there(&records);

    let csv = std::fs::read_to_string(&outputs.csv).expect("the records are there as CSV too");
    assert_eq!(csv.lines().count(), records.len() + 1);
    let columns = csv.lines().map(|line| line.split(',').count()).collect::<BTreeSet<_>>();
    assert_eq!(columns, BTreeSet::from([10]));
    assert!(table.lines().filter(|line| line.contains(" process_fork ")).any(|line| line.contains(" x")));

    let page = std::fs::read_to_string(&outputs.report).expect("the report is there");
    for title in ["Pause of the source", "Cost of a page", "Memory of one more clone", "Ratios", "Host"] {
        assert!(page.contains(title), "the report has no {title}");
    }
    assert!(!page.contains("NaN") && page.ends_with("</html>\n"), "the report is broken");
}

fn check_record(record: &Record, runs: usize) {
    let ordered = [record.min, record.p50, record.p90, record.p99, record.max];
    assert!(ordered.is_sorted() && ordered[4].is_finite(), "{record:?}");
    // Others who give memory back may have more than clones take.
    assert!(ordered[0] >= 0.0 || record.quantity.starts_with("marginal_"), "{record:?}");
    // One for each call, or for all of them.
    let n = match record.quantity.as_str() {
        "call_of_many" | "pause_of_many" => 4,
        "calls_4" => 1,
        _ => runs,
    };
    assert_eq!(record.n, n, "{record:?}");
}

fn check_who_is_there(records: &[Record]) {
    let found: BTreeSet<_> = records.iter().map(|r| (r.quantity.as_str(), r.subject.as_str())).collect();
    let require = |quantity, subject| {
        assert!(found.contains(&(quantity, subject)), "no {quantity} of {subject}");
    };
    for quantity in COMPARED {
        BASELINES.iter().chain(&["salp"]).for_each(|subject| require(quantity, subject));
    }
    for quantity in OF_CROWDS {
        CROWDS.iter().chain(&["salp"]).for_each(|subject| require(quantity, subject));
    }
    SALPS_ALONE.iter().for_each(|quantity| require(quantity, "salp"));
    ["marginal_idle", "mappings"].iter().for_each(|quantity| require(quantity, "bare_vm"));
    ["salp", "full_copy", "process_fork", "snapshot"]
        .iter()
        .for_each(|subject| require("source_throughput", subject));
    ["fork_call_memory", "stage.save", "stage.protect"].iter().for_each(|quantity| require(quantity, "host"));
    ["salp", "pwrite_memfd"].iter().for_each(|subject| require("publish_rate", subject));
    let has_param = |name: &str| records.iter().any(|record| record.params.contains_key(name));
    for name in ["others", "dirty_pages", "hot_leaves", "dirty_in_leaf", "window_ms"] {
        assert!(has_param(name), "nothing is measured with {name}");
    }
}

#[test]
fn threads() {
    match Userfault::open() {
        Ok(_) => check("thread", RUNS_OF_THREADS),
        Err(error) => println!("SKIPPED: bench with threads: {error}"),
    }
}

#[test]
fn kvm() {
    match Userfault::open()
        .map_err(|error| error.to_string())
        .and_then(|_| Kvm::open().map_err(|error| error.to_string()))
    {
        Ok(_) => check("kvm", RUNS_OF_KVM),
        Err(error) => println!("SKIPPED: bench with KVM: {error}"),
    }
}

#[test]
fn nonsense_is_refused_in_one_line() {
    for (arguments, named) in [
        (["bench", "fork", "--dirty", "much"], "much"),
        (["bench", "fork", "--memory", "3"], "16M"),
        (["bench", "nothing", "--runs", "1"], "nothing"),
        (["bench", "fork", "--baseline", "magic"], "magic"),
        (["bench", "fork", "--from", "/nowhere/at/all"], "/nowhere/at/all"),
    ] {
        let run = Command::new(salp_binary()).args(arguments).output().expect("the program starts");
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(!run.status.success() && said.lines().count() == 1 && said.contains(named), "{said}");
    }
}
