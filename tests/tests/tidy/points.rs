//! The house rule for failure injection: on the paths of a fork, a publication, a pin, a reset and an
//! exit a fallible step has a point (`salp::failure`), or says why it needs none.
//!
//! A *step* is a call whose result is handled: by `?`, `if let Err`, a `match` with `Err`, `is_err`,
//! `is_ok`, `ok`; or any call of libc or rustix. It is covered where
//! - it is a point, or comes next after one in its function: points stand right before their steps;
//! - it calls a function of these files, whose own steps are looked at there;
//! - it asks nobody outside: [`PURE`];
//! - its line, or one of the four before, says `// no failure point:` and why.
//!
//! Known holes: this is lexical. A result that is returned as it is, without `?`, is the step of
//! whoever called, and a name stands for all functions of that name.

use std::collections::BTreeSet;

use super::{code_of, functions, report, sources};

/// The files that the paths lead through, below `vmm/src`.
const FILES: [&str; 36] = [
    "arena_files/mod.rs",
    "board/mod.rs",
    "devices/dma/workers.rs",
    "family/mod.rs",
    "ipc/channel.rs",
    "ipc/shared.rs",
    "keeper/fork.rs",
    "keeper/limits.rs",
    "keeper/member_handle.rs",
    "keeper/mod.rs",
    "keeper/pause.rs",
    "keeper/reset.rs",
    "keeper/steward.rs",
    "kvm/close.rs",
    "kvm/error.rs",
    "kvm/state.rs",
    "kvm/vcpu.rs",
    "member/cutting.rs",
    "member/extents.rs",
    "member/life.rs",
    "member/reset.rs",
    "member/services.rs",
    "space/cut.rs",
    "space/discard.rs",
    "space/fault.rs",
    "space/force.rs",
    "space/mod.rs",
    "space/pin.rs",
    "space/report.rs",
    "space/reset.rs",
    "tables/tree.rs",
    "window/mapping.rs",
    "window/mod.rs",
    "window/pagemap.rs",
    "window/publish.rs",
    "window/restore.rs",
];

/// Calls that ask nobody outside: they look at what is there, turn one thing into another, or wait for a
/// thread of this process. The host cannot refuse to unmap what is a mapping of its own.
const PURE: [&str; 21] = [
    "as_ref",
    "binary_search",
    "check_name",
    "checked_add",
    "checked_sub",
    "filter",
    "iter",
    "join",
    "last_os_error",
    "live",
    "munmap",
    "ok_or",
    "ok_or_else",
    "recv_timeout",
    "replace",
    "take_from_bytes",
    "to_stdvec",
    "role",
    "to_str",
    "try_from",
    "try_into",
];

/// What a result passes through on its way to being handled.
const ADAPTORS: [&str; 9] = [
    "map_err",
    "transpose",
    "inspect_err",
    "and_then",
    "map",
    "collect",
    "unwrap_or_else",
    "or_else",
    "flatten",
];

/// Functions of the files that are on none of the paths: a colony, a member, a first VM is made there
/// (of a member, `keeper.member` stands for all), an order is waited for, the checker looks.
const ELSEWHERE: [(&str, &str); 16] = [
    ("arena_files/mod.rs", "is_same_file"),
    ("ipc/channel.rs", "pair"),
    ("ipc/channel.rs", "from_fd"),
    ("ipc/shared.rs", "create"),
    ("ipc/shared.rs", "from_fd"),
    ("ipc/shared.rs", "map"),
    ("ipc/shared.rs", "resident_bytes"),
    ("keeper/member_handle.rs", "start"),
    ("keeper/member_handle.rs", "hatch"),
    ("keeper/mod.rs", "wait_until_gone"),
    ("kvm/state.rs", "of"),
    ("kvm/vcpu.rs", "spawn"),
    ("member/life.rs", "boot"),
    ("member/reset.rs", "wait"),
    ("window/mod.rs", "new"),
    ("window/pagemap.rs", "frame_numbers"),
];

const EXEMPTION: &str = "// no failure point:";

/// A step in a file's code.
#[derive(Debug, PartialEq)]
struct Step {
    at: usize,
    callee: String,
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The word that ends before `end`.
fn word_before(code: &str, end: usize) -> &str {
    let start = code[..end].rfind(|c| !is_word(c)).map_or(0, |at| at + 1);
    &code[start..end]
}

/// Where the bracket opens that closes right before `end`.
fn opening(code: &str, end: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, c) in code[..end].char_indices().rev() {
        match c {
            ')' | ']' | '}' => depth += 1,
            '(' | '[' | '{' if depth == 1 => return Some(at),
            '(' | '[' | '{' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    None
}

/// The call, or the name, whose value is what ends before `end`, behind all adaptors.
fn callee(code: &str, end: usize) -> Option<String> {
    let mut end = code[..end].trim_end().len();
    loop {
        while code[..end].ends_with('?') {
            end = code[..end - 1].trim_end().len();
        }
        if !code[..end].ends_with(')') {
            let name = word_before(code, end);
            return value_of(code, name, end);
        }
        let mut start = opening(code, end)?;
        if code[..start].ends_with('>') {
            // A turbofish.
            start = code[..start].rfind("::<")?;
        }
        let name = word_before(code, start);
        let before = start - name.len();
        if !ADAPTORS.contains(&name) || !code[..before].ends_with('.') {
            return (!name.is_empty()).then(|| name.to_owned());
        }
        end = code[..before - 1].trim_end().len();
    }
}

/// What a variable was made by, where that can be seen.
fn value_of(code: &str, name: &str, end: usize) -> Option<String> {
    let head = format!("let {name} = ");
    let made = &code[code[..end].rfind(&head)? + head.len()..];
    let made = &made[..made.find(';')?];
    if made.contains('{') { None } else { callee(made, made.len()) }
}

/// The steps of a piece of code, in their order.
fn steps(code: &str) -> Vec<Step> {
    let mut found = Vec::new();
    let mut push = |at: usize, end: usize| found.extend(callee(code, end).map(|callee| Step { at, callee }));
    for (at, _) in code.match_indices('?') {
        // `?Sized` is no operator.
        if !code[at + 1..].starts_with(is_word) {
            push(at, at);
        }
    }
    for method in [".is_err()", ".is_ok()", ".ok()"] {
        for (at, _) in code.match_indices(method) {
            push(at, at);
        }
    }
    for head in ["if let Err(", "&& let Err(", "match "] {
        for (at, _) in code.match_indices(head) {
            let Some(open) = code[at..].find(" {\n").map(|found| at + found) else { continue };
            let is_handled = head != "match " || block(code, open + 1).contains("Err(");
            if is_handled && !code[at..open].contains("&&") | (head == "&& let Err(") {
                push(at, open);
            }
        }
    }
    for library in ["libc::", "rustix::", "failure::point"] {
        for (at, _) in code.match_indices(library) {
            let path = code[at..].find(|c| !is_word(c) && c != ':').unwrap_or(0);
            let name = word_before(code, at + path);
            if code[at + path..].starts_with('(') && name.starts_with(char::is_lowercase) {
                found.push(Step { at, callee: name.to_owned() });
            }
        }
    }
    found.sort_by_key(|step| step.at);
    // One call was found twice: by its path, and by what is done with its result.
    found.dedup_by(|later, earlier| {
        later.callee == earlier.callee && !code[earlier.at..later.at].contains(';')
    });
    found
}

/// The block that opens at `open`.
fn block(code: &str, open: usize) -> &str {
    let mut depth = 0_usize;
    for (at, c) in code[open..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 1 => return &code[open..open + at],
            '}' => depth -= 1,
            _ => {}
        }
    }
    &code[open..]
}

/// The steps of a file that nothing covers, each with its line. `known` are the functions of all files.
fn uncovered(file: &str, text: &str, known: &BTreeSet<String>) -> Vec<(usize, String)> {
    let code = code_of(text);
    let end = code.find("#[cfg(test)]").unwrap_or(code.len());
    let code = &code[..end];
    let lines: Vec<_> = text.lines().collect();
    let line_of = |at: usize| code[..at].matches('\n').count();
    let functions = functions(code);
    let starts: BTreeSet<usize> = functions.iter().map(|function| function.line - 1).collect();
    let elsewhere = functions.iter().filter(|function| ELSEWHERE.contains(&(file, &function.name)));
    let elsewhere: Vec<_> =
        elsewhere.map(|function| function.line..function.line + function.len_lines).collect();
    let mut broken = Vec::new();
    let mut last_point = None;
    for step in steps(code) {
        let line = line_of(step.at);
        // A point of an earlier function is none of this one's.
        let is_after_point = last_point
            .take()
            .is_some_and(|point| !starts.iter().any(|start| (point + 1..=line).contains(start)));
        if matches!(step.callee.as_str(), "point" | "call") {
            last_point = Some(line);
            continue;
        }
        let is_exempt = lines[line.saturating_sub(4)..=line].iter().any(|line| line.contains(EXEMPTION));
        let is_known = known.contains(&step.callee) || PURE.contains(&step.callee.as_str());
        let is_elsewhere = elsewhere.iter().any(|lines| lines.contains(&(line + 1)));
        if !(is_after_point || is_known || is_exempt || is_elsewhere) {
            broken.push((line + 1, step.callee));
        }
    }
    broken
}

fn texts() -> Vec<(&'static str, String)> {
    let all = sources("vmm/src");
    let text = |file: &'static str| {
        let path = std::path::Path::new("vmm/src").join(file);
        let source = all.iter().find(|source| source.path == path);
        (file, source.unwrap_or_else(|| panic!("{file} is gone")).text.clone())
    };
    FILES.into_iter().map(text).collect()
}

fn declared_in(texts: &[(&str, String)]) -> BTreeSet<String> {
    let names = texts.iter().flat_map(|(_, text)| functions(&code_of(text)));
    names.map(|function| function.name).collect()
}

#[test]
fn every_fallible_step_has_a_point() {
    let texts = texts();
    let known = declared_in(&texts);
    let broken: Vec<_> = texts
        .iter()
        .flat_map(|(file, text)| {
            uncovered(file, text, &known).into_iter().map(move |(line, callee)| (file, line, callee))
        })
        .map(|(file, line, callee)| format!("vmm/src/{file}:{line}: {callee}"))
        .collect();
    report(
        "a fallible step has a failure::point right before it, or `// no failure point:` and why",
        &broken,
    );
}

#[test]
fn a_points_name_is_used_once() {
    let mut names = BTreeSet::new();
    let mut broken = Vec::new();
    for source in sources("vmm/src").iter().filter(|source| !source.path.ends_with("failure.rs")) {
        let points = source.text.split("failure::point(").skip(1);
        let calls = source.text.split("KvmError::call(").skip(1);
        for rest in points.chain(calls) {
            // One of two names stands behind a condition.
            let statement = &rest[..rest.find([';', '|']).unwrap_or(rest.len())];
            for name in statement.split('"').skip(1).step_by(2).take(2).filter(|name| !name.contains(' ')) {
                if !names.insert(name.to_owned()) {
                    broken.push(format!("{}: {name}", source.path.display()));
                }
            }
        }
    }
    assert!(names.len() > 20, "{names:?}");
    report("the name of a point of failure is used once", &broken);
}

#[test]
fn a_step_without_a_point_is_found() {
    let known = BTreeSet::from(["inner".to_owned()]);
    let of = |body: &str| -> Vec<String> {
        let text = format!("fn one() -> io::Result<()> {{\n{body}\n}}\n");
        uncovered("", &text, &known).into_iter().map(|(_, callee)| callee).collect()
    };
    assert_eq!(of("    File::open(path)?;"), ["open"]);
    assert_eq!(of("    let x = a.b(1).map_err(|e| f(e)?)?.c::<u8>(2)?;"), ["f", "b", "c"]);
    assert_eq!(of("    if let Err(error) = self.file.write(x) {\n    }"), ["write"]);
    assert_eq!(of("    match write(x) {\n        Err(_) => {}\n    }"), ["write"]);
    assert_eq!(of("    match read(x) {\n        Some(_) => {}\n    }"), Vec::<String>::new());
    assert_eq!(of("    let done = write(x);\n    done?;"), ["write"]);
    assert_eq!(of("    unsafe { libc::mmap(a, b) };"), ["mmap"]);
    for covered in [
        "    failure::point(\"a\")?;\n    File::open(path)?;",
        "    KvmError::call(\"b\", || fd.get())?;",
        "    inner(x)?;",
        "    x.ok_or(1)?;",
        "    // no failure point: it is in memory\n    File::open(path)?;",
    ] {
        assert_eq!(of(covered), Vec::<String>::new(), "{covered}");
    }
    let second = "    failure::point(\"a\")?;\n    open(x)?;\n    close(x)?;";
    assert_eq!(of(second), ["close"], "a point stands for one step");
    let text = "fn one() -> R {\n    failure::point(\"a\")?;\n}\nfn two() -> R {\n    open(x)?;\n}\n";
    assert_eq!(uncovered("", text, &known), [(5, "open".to_owned())]);
}
