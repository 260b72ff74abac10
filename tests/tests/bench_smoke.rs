//! The benchmark works: every benchmark gives its records, of salp and of every baseline, and they
//! parse. Nothing here looks at how long anything took.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

use salp::bench::report::Record;
use salp::kvm::Kvm;
use salp::window::Userfault;
use salp_tests::procs::salp_binary;

const RUNS: usize = 2;
const BASELINES: [&str; 3] = ["full_copy", "process_fork", "static_template"];
const COMPARED: [&str; 6] =
    ["fork_call", "pause", "first_instruction", "first_read_page", "first_write_page", "fresh_write_page"];
const SALPS_ALONE: [&str; 6] = [
    "first_read_page_at_once",
    "first_write_page_at_once",
    "pin_copy_page",
    "chain_call",
    "chain_pause",
    "stage.protect",
];

/// Where the records go; removed when dropped.
struct Outputs {
    json: PathBuf,
    csv: PathBuf,
}

impl Outputs {
    fn new(guest: &str) -> Self {
        let name = |kind: &str| format!("salp-bench-{}-{guest}.{kind}", std::process::id());
        let [json, csv] = ["json", "csv"].map(|kind| std::env::temp_dir().join(name(kind)));
        Self { json, csv }
    }
}

impl Drop for Outputs {
    fn drop(&mut self) {
        for path in [&self.json, &self.csv] {
            // Not there where the test failed before.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn check(guest: &str) {
    let outputs = Outputs::new(guest);
    let run = Command::new(salp_binary())
        .args(["bench", "all", "--memory", "16M", "--dirty", "all", "--huge", "on,off", "--pins", "8"])
        .args(["--runs", &RUNS.to_string(), "--guest", guest])
        .arg("--json")
        .arg(&outputs.json)
        .arg("--csv")
        .arg(&outputs.csv)
        .output()
        .expect("the program starts");
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "it ends with {}: {said}", run.status);

    let text = std::fs::read_to_string(&outputs.json).expect("the records are there");
    let mut list: Vec<serde_json::Value> = serde_json::from_str(&text).expect("they are JSON");
    let host = list.pop().expect("the host's is the last");
    assert!(host["host"]["host"]["kernel_release"].is_string(), "{host}");
    assert!(!host["host"]["arenas"].as_array().expect("a list").is_empty(), "{host}");
    let records: Vec<Record> =
        list.into_iter().map(|record| serde_json::from_value(record).expect("a record")).collect();
    for record in &records {
        let ordered = [record.min, record.p50, record.p90, record.p99, record.max];
        assert!(ordered.is_sorted() && ordered[0] >= 0.0 && ordered[4].is_finite(), "{record:?}");
        assert_eq!(record.n, RUNS, "{record:?}");
    }

    let found: BTreeSet<_> = records.iter().map(|r| (r.quantity.as_str(), r.subject.as_str())).collect();
    for quantity in COMPARED {
        for subject in BASELINES.iter().chain(&["salp"]) {
            assert!(found.contains(&(quantity, subject)), "no {quantity} of {subject}");
        }
    }
    for quantity in SALPS_ALONE {
        assert!(found.contains(&(quantity, "salp")), "no {quantity}");
    }
    assert!(found.contains(&("publish_rate", "salp")) && found.contains(&("publish_rate", "pwrite_memfd")));

    let csv = std::fs::read_to_string(&outputs.csv).expect("the records are there as CSV too");
    assert_eq!(csv.lines().count(), records.len() + 1);
    let columns = csv.lines().map(|line| line.split(',').count()).collect::<BTreeSet<_>>();
    assert_eq!(columns, BTreeSet::from([10]));
    let table = String::from_utf8_lossy(&run.stdout);
    assert!(table.lines().filter(|line| line.contains(" process_fork ")).any(|line| line.contains(" x")));
}

#[test]
fn threads() {
    match Userfault::open() {
        Ok(_) => check("thread"),
        Err(error) => println!("SKIPPED: bench with threads: {error}"),
    }
}

#[test]
fn kvm() {
    match Userfault::open()
        .map_err(|error| error.to_string())
        .and_then(|_| Kvm::open().map_err(|error| error.to_string()))
    {
        Ok(_) => check("kvm"),
        Err(error) => println!("SKIPPED: bench with KVM: {error}"),
    }
}

#[test]
fn nonsense_is_refused_in_one_line() {
    for (arguments, named) in [
        (["bench", "fork", "--dirty", "much"], "much"),
        (["bench", "fork", "--memory", "3"], "16M"),
        (["bench", "nothing", "--runs", "1"], "nothing"),
    ] {
        let run = Command::new(salp_binary()).args(arguments).output().expect("the program starts");
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(!run.status.success() && said.lines().count() == 1 && said.contains(named), "{said}");
    }
}
