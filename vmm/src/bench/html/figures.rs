//! Which plots a report has, and of which records.

use super::chart::{Axis, Bars, Key, Line, Mark, Stack, bars, escape, legend, lines, stacks};
use super::subject_name;
use crate::bench::report::{HOST, Record, SALP, Unit};

/// Plots that belong together.
pub(super) struct Section {
    pub(super) title: &'static str,
    pub(super) text: &'static str,
    /// Each a whole `figure` element.
    pub(super) figures: Vec<String>,
}

/// Parts of the pause, in their order.
const PAUSE: [&str; 7] = ["stop", "hold", "save", "copy", "protect", "collect", "resume"];
/// Parts of it that take what the host takes.
const FLOOR: [&str; 2] = ["save", "protect"];
/// Parts of salp's call, one after the other: the source's resume is beside `hop_to_keeper`.
const CALL: [&str; 12] = [
    "reserve_structure",
    "hop_to_source",
    "reserve_memory",
    "stop",
    "hold",
    "save",
    "copy",
    "protect",
    "collect",
    "hop_to_keeper",
    "clone",
    "enter",
];
/// Parts of a call by `fork()`, one after the other.
const CALL_OF_FORK: [&str; 4] = ["save", "fork_to_child", "make_vm", "set"];
/// Subjects, and the class that each is drawn with.
const SUBJECTS: [(&str, &str); 7] = [
    (SALP, "salp"),
    ("process_fork", "fork"),
    ("full_copy", "copy"),
    ("static_template", "template"),
    ("snapshot", "snapshot"),
    ("bare_vm", "bare"),
    ("pwrite_memfd", "bare"),
];

/// Records of which some parameters are known.
#[derive(Clone)]
struct Chosen<'a>(Vec<&'a Record>);

impl<'a> Chosen<'a> {
    fn of(&self, quantity: &str) -> Self {
        self.filter(|record| record.quantity == quantity)
    }

    fn by(&self, subject: &str) -> Self {
        self.filter(|record| record.subject == subject)
    }

    fn with(&self, name: &str, value: &str) -> Self {
        self.filter(|record| param(record, name) == value)
    }

    fn filter(&self, is: impl Fn(&Record) -> bool) -> Self {
        Self(self.0.iter().copied().filter(|record| is(record)).collect())
    }

    /// The values of a parameter, in the order of the records.
    fn values(&self, name: &str) -> Vec<String> {
        let mut values = Vec::new();
        for value in self.0.iter().map(|record| param(record, name)).filter(|value| !value.is_empty()) {
            if !values.contains(&value) {
                values.push(value);
            }
        }
        values
    }

    fn first(&self) -> Option<&'a Record> {
        self.0.first().copied()
    }
}

/// A parameter as text; empty where there is none.
fn param(record: &Record, name: &str) -> String {
    match record.params.get(name) {
        None => String::new(),
        Some(serde_json::Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// A size or number such as `128M` or `1000`.
fn number(text: &str) -> f64 {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let shift = match &text[split..] {
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => 0,
    };
    text[..split].parse::<f64>().unwrap_or(0.0) * f64::from(1 << shift)
}

fn figure(title: &str, note: &str, legend: &str, svg: &str) -> String {
    let (title, note) = (escape(title), escape(note));
    format!(
        "<figure><figcaption><b>{title}</b><span>{note}</span></figcaption>{legend}\
         <div class=\"plot\">{svg}</div></figure>"
    )
}

/// A note that says how the vertical axis goes, where that is not as usual.
fn noted(note: &str, axis: Axis) -> String {
    match axis {
        Axis::Even => note.to_owned(),
        Axis::Logarithmic => format!("{note} · logarithmic"),
    }
}

fn line_figure(
    (title, note, below): (&str, &str, &str),
    axis: Axis,
    ticks: &[(f64, String)],
    all: &[Line],
) -> Option<String> {
    let all: Vec<_> = all.iter().filter(|line| !line.marks.is_empty()).cloned().collect();
    let unit = Unit::Microseconds;
    (!all.is_empty()).then(|| {
        let legend = legend(Key::Line, all.iter().map(|line| (line.name.as_str(), line.class)));
        figure(title, &noted(note, axis), &legend, &lines(title, below, unit, axis, ticks, &all))
    })
}

fn bar_figure(
    (title, note, below): (&str, &str, &str),
    unit: Unit,
    axis: Axis,
    groups: &[String],
    all: &[Bars],
) -> Option<String> {
    let all: Vec<_> = all.iter().filter(|bars| bars.marks.iter().any(Option::is_some)).cloned().collect();
    (!all.is_empty()).then(|| {
        let legend = legend(Key::Bar, all.iter().map(|bars| (bars.name.as_str(), bars.class)));
        figure(title, &noted(note, axis), &legend, &bars(title, below, unit, axis, groups, &all))
    })
}

/// All sections, in their order on the page.
pub(super) fn sections(records: &[Record]) -> Vec<Section> {
    let all = Chosen(records.iter().collect());
    let each = |make: fn(&Chosen<'_>, &str) -> Vec<Option<String>>| -> Vec<String> {
        let of = |huge: &str| {
            let note = if huge == "on" { "huge pages" } else { "4 KiB pages" };
            make(&all.with("huge", huge), note)
        };
        ["on", "off"].iter().flat_map(|huge| of(huge)).flatten().collect()
    };
    let section = |title, text, figures| Section { title, text, figures };
    vec![
        section(
            "Latency against memory",
            "From the request for a fork to the clone's vCPU in the guest (call), to its first \
             instruction, and to the sum of 1 MiB that it has read while publication goes on. The pause \
             is how long the source stood still.",
            each(latency),
        ),
        section(
            "Where the time goes",
            "Medians of the parts, one after the other. Their sum is not the median of the whole.",
            each(stages),
        ),
        section(
            "Latency against dirty pages",
            "What the source wrote before its fork; and a source whose memory lies in the arena, which \
             has written single pages since.",
            each(dirty),
        ),
        section(
            "Pinned pages",
            "Pages that a device holds are copied in the pause, exactly those.",
            each(pins),
        ),
        section(
            "Touching memory in a clone",
            "For each 4 KiB page, one after the other, when all is published. The first write in a leaf \
             of 2 MiB stands apart.",
            each(touches),
        ),
        section(
            "Many clones",
            "Memory of one more clone is what the host has available less, page tables and the kernel's \
             objects included. A bare VM has run one instruction.",
            each(many),
        ),
        section(
            "After the fork",
            "What the source still does, how fast its pages are published, and what memory that writes.",
            each(after),
        ),
        section("Clones of clones", "Each writes 8 MiB before it is forked.", each(chain)),
    ]
}

/// Figures for the head of the page: salp's, at the largest memory with everything written.
pub(super) fn highlights(records: &[Record]) -> Vec<(String, &Record)> {
    let all = Chosen(records.iter().filter(|record| record.subject == SALP).collect());
    let mut found = Vec::new();
    for (quantity, label) in [
        ("pause", "pause of the source"),
        ("fork_call", "fork call"),
        ("first_mib", "first MiB read"),
        ("first_read_page", "first read of a page"),
        ("marginal_idle", "memory of an idle clone"),
    ] {
        let of = all.of(quantity).filter(|record| param(record, "others").is_empty());
        let waiting = of.with("source", "waiting");
        let of = if waiting.0.is_empty() { of } else { waiting };
        let most = of.0.iter().max_by(|a, b| {
            let key = |record: &Record| number(&param(record, "memory"));
            let dirty = |record: &Record| param(record, "dirty") == "all";
            let huge = |record: &Record| param(record, "huge") == "on";
            (dirty(a), huge(a)).cmp(&(dirty(b), huge(b))).then(key(a).total_cmp(&key(b)))
        });
        if let Some(record) = most {
            found.push((format!("{label}, {}", param(record, "memory")), *record));
        }
    }
    found
}

/// One line for each subject and way of the source, by the place that `at` gives a record.
fn lines_of(some: &Chosen<'_>, at: impl Fn(&Record) -> f64) -> Vec<Line> {
    let mut found = Vec::new();
    for (subject, class) in SUBJECTS {
        for (source, suffix) in [("running", ", source running"), ("waiting", ""), ("", "")] {
            let records = some.by(subject).with("source", source);
            let mut marks: Vec<_> = records.0.iter().map(|record| (at(record), Mark::of(record))).collect();
            marks.sort_by(|a, b| a.0.total_cmp(&b.0));
            let class = match (class, source) {
                ("salp", "running") => "salp running",
                (class, _) => class,
            };
            found.push(Line { name: format!("{}{suffix}", subject_name(subject)), class, marks });
        }
    }
    found
}

fn latency(some: &Chosen<'_>, note: &str) -> Vec<Option<String>> {
    let dirty = some.of("pause").values("dirty");
    let Some(most) = dirty.iter().find(|dirty| *dirty == "all").or(dirty.last()) else { return Vec::new() };
    let note = format!("{note}, written before: {most}");
    let make = |(quantity, title): (&str, &str)| {
        let records = some.of(quantity).with("dirty", most);
        let at = |memory: &str| number(memory).max(1.0).log2();
        let ticks: Vec<_> =
            records.values("memory").iter().map(|memory| (at(memory), memory.clone())).collect();
        let all = lines_of(&records, |record| at(&param(record, "memory")));
        line_figure((title, &note, "memory of the VM"), Axis::Logarithmic, &ticks, &all)
    };
    [
        ("pause", "Pause of the source"),
        ("fork_call", "Fork call"),
        ("first_instruction", "First instruction of the clone"),
        ("first_mib", "First answer: 1 MiB read"),
    ]
    .map(make)
    .into()
}

fn stages(some: &Chosen<'_>, note: &str) -> Vec<Option<String>> {
    let dirty = some.of("pause").values("dirty");
    let Some(most) = dirty.iter().find(|dirty| *dirty == "all").or(dirty.last()) else { return Vec::new() };
    let some = some.with("dirty", most);
    let row = |subject: &str, source: &str, memory: &str, parts: &[&str]| {
        let of = |part: &&str| {
            let records = some.of(&format!("stage.{part}")).by(subject).with("source", source);
            records.with("memory", memory).first().map(|record| record.p50)
        };
        let found: Vec<_> = parts.iter().map(of).collect();
        let name =
            if subject == SALP { memory.to_owned() } else { format!("{memory} {}", subject_name(subject)) };
        found
            .iter()
            .any(Option::is_some)
            .then(|| Stack { name, parts: found.into_iter().map(|value| value.unwrap_or(0.0)).collect() })
    };
    let memory = some.of("pause").values("memory");
    let source = match some.of("stage.stop").by(SALP).with("source", "running").0.is_empty() {
        true => "waiting",
        false => "running",
    };
    let make = |title: &str, note: &str, subject: &str, source: &str, parts: &[&str]| {
        let rows: Vec<_> = memory.iter().filter_map(|memory| row(subject, source, memory, parts)).collect();
        let classes: Vec<_> = (0..parts.len()).map(|i| format!("stage{i}")).collect();
        let names = parts.iter().map(|part| part.replace('_', " ")).collect::<Vec<_>>();
        let legend =
            legend(Key::Bar, names.iter().map(String::as_str).zip(classes.iter().map(String::as_str)));
        let svg = stacks(title, Unit::Microseconds, parts, &rows);
        (!rows.is_empty()).then(|| figure(title, note, &legend, &svg))
    };
    vec![
        make("Parts of the pause", &format!("salp, source {source}, {note}"), SALP, source, &PAUSE),
        make("What the host takes for two of them alone", note, HOST, "waiting", &FLOOR),
        make("Parts of the fork call", &format!("salp, source {source}, {note}"), SALP, source, &CALL),
        make("Parts of a call by fork()", note, "process_fork", "waiting", &CALL_OF_FORK),
    ]
}

fn dirty(some: &Chosen<'_>, note: &str) -> Vec<Option<String>> {
    let mut found = Vec::new();
    let pauses = some.of("pause");
    if let (Some(memory), true) = (pauses.values("memory").last(), pauses.values("dirty").len() > 1) {
        let whole = number(memory);
        let bytes = |dirty: &str| match dirty.strip_suffix('%') {
            _ if dirty == "all" => whole,
            Some(percent) => whole * number(percent) / 100.0,
            None => number(dirty),
        };
        for (quantity, title) in [("pause", "Pause of the source"), ("fork_call", "Fork call")] {
            let records = some.of(quantity).with("memory", memory);
            let mut ticks: Vec<_> =
                records.values("dirty").iter().map(|dirty| (bytes(dirty), dirty.clone())).collect();
            ticks.sort_by(|a, b| a.0.total_cmp(&b.0));
            let all = lines_of(&records, |record| bytes(&param(record, "dirty")));
            let note = format!("{note}, {memory}");
            let labels = (title, note.as_str(), "memory written before");
            found.push(line_figure(labels, Axis::Logarithmic, &ticks, &all));
        }
    }
    found.push(scattered(some, note));
    found
}

fn scattered(some: &Chosen<'_>, note: &str) -> Option<String> {
    let records = some.of("scattered_pause");
    let pages = records.values("dirty_pages");
    let hot = records.values("hot_leaves");
    let mut groups: Vec<_> = pages.iter().map(|pages| format!("{pages} pages")).collect();
    groups.extend(hot.iter().map(|leaves| format!("{leaves} hot leaves")));
    let all: Vec<_> =
        [("clone", "source is a clone", "salp"), ("dropped", "source dropped its copies", "running-bar")]
            .map(|(source, name, class)| {
                let records = records.with("source", source);
                let one = |name: &str, value: &String| records.with(name, value).first().map(Mark::of);
                let marks = pages.iter().map(|value| one("dirty_pages", value));
                let marks = marks.chain(hot.iter().map(|value| one("hot_leaves", value))).collect();
                Bars { name: name.to_owned(), class, marks }
            })
            .into();
    let memory = records.values("memory").join(", ");
    let note = format!("{note}, {memory}, running source in the arena");
    bar_figure(
        ("Pause with scattered pages", &note, "written since"),
        Unit::Microseconds,
        Axis::Even,
        &groups,
        &all,
    )
}

fn pins(some: &Chosen<'_>, note: &str) -> Vec<Option<String>> {
    let records = some.of("pin_pause");
    let ticks: Vec<_> = records.values("pins").iter().map(|pins| (number(pins), pins.clone())).collect();
    let all = [("together", "together", "salp"), ("scattered", "one page in four", "salp running")];
    let all = all.map(|(layout, name, class)| {
        let marks = records
            .with("layout", layout)
            .0
            .iter()
            .map(|r| (number(&param(r, "pins")), Mark::of(r)))
            .collect();
        Line { name: name.to_owned(), class, marks }
    });
    let note = format!("{note}, {}", records.values("memory").join(", "));
    vec![line_figure(("Pause against pinned pages", &note, "pinned pages"), Axis::Even, &ticks, &all)]
}

/// Bars of each subject, for groups that are quantities.
fn by_subject(some: &Chosen<'_>, quantities: &[&str]) -> Vec<Bars> {
    let of = |(subject, class): (&str, &'static str)| Bars {
        name: subject_name(subject).to_owned(),
        class,
        marks: quantities.iter().map(|q| some.of(q).by(subject).first().map(Mark::of)).collect(),
    };
    SUBJECTS.map(of).into()
}

fn touches(some: &Chosen<'_>, note: &str) -> Vec<Option<String>> {
    let quantities = ["first_read_page", "first_write_leaf", "first_write_page", "fresh_write_page"];
    let groups = ["read", "write, first in a leaf", "write", "write, never touched"].map(str::to_owned);
    let memory = some.of("first_read_page").values("memory");
    let make = |memory: &String| {
        let here = some.with("memory", memory);
        let mut all = by_subject(&here.with("others", ""), &quantities);
        let crowd = here.filter(|record| !param(record, "others").is_empty());
        let others = crowd.values("others").join(", ");
        let marks = quantities.iter().map(|q| crowd.of(q).first().map(Mark::of)).collect();
        all.insert(1, Bars { name: format!("salp, {others} others alive"), class: "running-bar", marks });
        let note = format!("{note}, {memory}");
        bar_figure(("Cost of a page", &note, ""), Unit::MicrosecondsPerPage, Axis::Logarithmic, &groups, &all)
    };
    memory.iter().map(make).collect()
}

fn many(some: &Chosen<'_>, note: &str) -> Vec<Option<String>> {
    let memory = some.of("marginal_idle");
    let density_note = format!(
        "{note}, {}, {} clones",
        memory.values("memory").join(", "),
        memory.values("clones").join(", ")
    );
    let groups = ["idle", "after writing 1 MiB"].map(str::to_owned);
    let density = bar_figure(
        ("Memory of one more clone", &density_note, ""),
        Unit::Kibibytes,
        Axis::Even,
        &groups,
        &by_subject(some, &["marginal_idle", "marginal_active"]),
    );
    let mut bursts: Vec<String> = Vec::new();
    for record in some.filter(|record| record.quantity.starts_with("burst_")).0 {
        if !bursts.contains(&record.quantity) {
            bursts.push(record.quantity.clone());
        }
    }
    let names: Vec<_> = bursts.iter().map(String::as_str).collect();
    let groups: Vec<_> = names.iter().map(|name| name.replace("burst_", "") + " clones").collect();
    let all = by_subject(some, &names);
    let burst = bar_figure(
        ("All clones of one fork alive and answering", note, ""),
        Unit::Microseconds,
        Axis::Logarithmic,
        &groups,
        &all,
    );
    vec![density, burst, calls_in_a_row(some, note)]
}

/// Of many fork calls the worst counts: median, 99th percentile and maximum beside each other.
fn calls_in_a_row(some: &Chosen<'_>, note: &str) -> Option<String> {
    let of = |name: &str, class: &'static str, pick: fn(&Record) -> f64| {
        let mark = |record| Mark { p50: pick(record), p90: pick(record), ..Mark::of(record) };
        let marks = ["call_of_many", "pause_of_many"].map(|quantity| some.of(quantity).first().map(mark));
        Bars { name: name.to_owned(), class, marks: marks.into() }
    };
    let all = [
        of("median", "salp", |record| record.p50),
        of("99th percentile", "running-bar", |record| record.p99),
        of("maximum", "bare", |record| record.max),
    ];
    let calls = some.of("call_of_many").values("calls").join(", ");
    let title = "One fork after another, all clones alive";
    let note = format!("{note}, {calls} calls");
    let groups = ["call", "pause"].map(str::to_owned);
    bar_figure((title, &note, ""), Unit::Microseconds, Axis::Logarithmic, &groups, &all)
}

fn after(some: &Chosen<'_>, note: &str) -> Vec<Option<String>> {
    let one = |title: &str, quantity: &str, below: &str| {
        let records = some.of(quantity);
        let unit = records.first()?.unit;
        let note = format!("{note}, {}", records.values("memory").join(", "));
        let groups = [below.to_owned()];
        bar_figure((title, &note, ""), unit, Axis::Even, &groups, &by_subject(&records, &[quantity]))
    };
    let published = some.of("published_leaf");
    let dirty = published.values("dirty_in_leaf");
    let groups: Vec<_> = dirty.iter().map(|pages| format!("{pages} of 512")).collect();
    let all = [("first", "memory of its own", "salp"), ("clone", "memory in the arena", "running-bar")];
    let all = all.map(|(source, name, class)| {
        let records = published.with("source", source);
        let marks =
            dirty.iter().map(|pages| records.with("dirty_in_leaf", pages).first().map(Mark::of)).collect();
        Bars { name: name.to_owned(), class, marks }
    });
    let labels = ("Memory written for each dirty leaf", note, "dirty pages in the leaf");
    vec![
        one("Work of the source, of what it did before", "source_throughput", "walking over all memory"),
        one("Publication", "publish_rate", "everything written, in one go"),
        bar_figure(labels, Unit::Kibibytes, Axis::Logarithmic, &groups, &all),
    ]
}

fn chain(some: &Chosen<'_>, note: &str) -> Vec<Option<String>> {
    let records = some.of("chain_call");
    let ticks: Vec<_> = records.values("depth").iter().map(|depth| (number(depth), depth.clone())).collect();
    let all = [("chain_call", "call", "salp"), ("chain_pause", "pause", "salp running")];
    let all = all.map(|(quantity, name, class)| {
        let marks = some.of(quantity).0.iter().map(|r| (number(&param(r, "depth")), Mark::of(r))).collect();
        Line { name: name.to_owned(), class, marks }
    });
    let note = format!("{note}, {}", records.values("memory").join(", "));
    vec![line_figure(("Fork at a depth", &note, "clone of a clone of a ..."), Axis::Even, &ticks, &all)]
}
