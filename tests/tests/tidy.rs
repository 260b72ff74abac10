//! The rules of the house, over every Rust file of the tree: headers, lengths, and the design's words.
//!
//! [`code_of`] blanks comments and literals, so that a brace in a string is no brace. What it leaves
//! is scanned by hand: enough for code that rustfmt has formatted, tested at the end of this file.

#[path = "tidy/points.rs"]
mod points;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Longest file, in lines.
const FILE_LIMIT_LINES: usize = 600;
/// Longest function, in lines from its `fn` to its closing brace.
const FUNCTION_LIMIT_LINES: usize = 70;
/// Longest line, in characters; tables and addresses of web pages may be longer.
const LINE_LIMIT_COLUMNS: usize = 110;
/// The words of the design: each is (part of) the name of a type, module or function of the monitor.
const WORDS: [&str; 15] = [
    "window", "arena", "block", "leaf", "space", "cut", "thunk", "force", "publish", "pin", "harvest",
    "member", "keeper", "colony", "pool",
];

/// A Rust file of the tree.
struct Source {
    /// Path from the root of the tree.
    path: PathBuf,
    text: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in the tree").to_owned()
}

/// All Rust files below `root/below`, but for what builds leave behind and what is hidden.
fn sources(below: &str) -> Vec<Source> {
    let root = root();
    let mut found = Vec::new();
    let mut directories = vec![root.join(below)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).expect("a directory of the tree") {
            let entry = entry.expect("an entry");
            let (path, name) = (entry.path(), entry.file_name());
            let is_hidden = name.to_string_lossy().starts_with('.');
            if entry.file_type().expect("a type").is_dir() {
                if !is_hidden && name != "target" {
                    directories.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("a text");
                let path = path.strip_prefix(&root).expect("below the root").to_owned();
                found.push(Source { path, text });
            }
        }
    }
    found.sort_by(|one, other| one.path.cmp(&other.path));
    assert!(!found.is_empty(), "no Rust file below {below:?}");
    found
}

fn report(rule: &str, broken: &[String]) {
    assert!(broken.is_empty(), "{rule}\n  {}\n", broken.join("\n  "));
}

#[test]
fn every_file_opens_with_what_it_is() {
    let broken: Vec<_> =
        sources("").iter().filter(|source| !source.text.starts_with("//!")).map(path).collect();
    report("a file opens with `//!`: what it is, its key types, its protocol, its holes", &broken);
}

#[test]
fn no_file_is_too_long() {
    let broken: Vec<_> = sources("")
        .iter()
        .filter(|source| source.text.lines().count() >= FILE_LIMIT_LINES)
        .map(|source| format!("{}: {} lines", path(source), source.text.lines().count()))
        .collect();
    report("a file is under 600 lines: split it by nouns", &broken);
}

#[test]
fn no_function_is_too_long() {
    let mut broken = Vec::new();
    for source in sources("") {
        for function in functions(&code_of(&source.text)) {
            if function.len_lines > FUNCTION_LIMIT_LINES {
                let Function { name, line, len_lines } = function;
                broken.push(format!("{}:{line}: {name} has {len_lines} lines", path(&source)));
            }
        }
    }
    report("a function has 70 lines at most", &broken);
}

#[test]
fn no_line_is_too_long() {
    let mut broken = Vec::new();
    for source in sources("") {
        for (line, text) in (1..).zip(source.text.lines()) {
            let columns = text.chars().count();
            if columns > LINE_LIMIT_COLUMNS && !may_be_long(text) {
                broken.push(format!("{}:{line}: {columns} columns", path(&source)));
            }
        }
    }
    report("a line has 110 columns at most, but for tables and web addresses", &broken);
}

#[test]
fn the_readme_names_every_module() {
    let Ok(readme) = fs::read_to_string(root().join("vmm/README.md")) else {
        println!("SKIPPED: the_readme_names_every_module: there is no vmm/README.md");
        return;
    };
    let named: BTreeSet<_> = identifiers(&readme).map(|(_, word)| word).collect();
    let broken: Vec<_> = sources("vmm/src")
        .iter()
        // What is only for tests stands beside the tests that say so.
        .filter(|source| !source.path.components().any(|part| part.as_os_str() == "tests"))
        .filter_map(|source| Some((module(&source.path)?, path(source))))
        .filter(|(module, _)| !named.contains(module))
        .map(|(module, path)| format!("{module} ({path})"))
        .collect();
    report("vmm/README.md names every module of the monitor", &broken);
}

#[test]
fn the_words_of_the_design_are_names() {
    let mut names = BTreeSet::new();
    for source in sources("vmm/src") {
        names.extend(module(&source.path).iter().flat_map(|name| words_of(name)));
        names.extend(declared(&code_of(&source.text)).iter().flat_map(|name| words_of(name)));
    }
    let missing: Vec<_> =
        WORDS.iter().filter(|word| !names.contains(**word)).map(|word| (*word).into()).collect();
    report("a word of the design is the name of a type, module or function; these are not", &missing);
}

fn path(source: &Source) -> String {
    source.path.display().to_string()
}

fn may_be_long(line: &str) -> bool {
    let text = line.trim_start().trim_start_matches(['/', '!']).trim_start();
    text.starts_with('|') || line.contains("://")
}

/// The module that a file is; `None` for roots of crates and for tests.
fn module(path: &Path) -> Option<String> {
    let name = match path.file_stem()?.to_str()? {
        "mod" => path.parent()?.file_name()?.to_str()?,
        "lib" | "main" | "tests" => return None,
        name => name,
    };
    Some(name.to_owned())
}

/// `text` with comments and the insides of literals replaced by blanks; lines stay where they are.
fn code_of(text: &str) -> String {
    let text: Vec<char> = text.chars().collect();
    let mut code = String::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let end = end_of_blank(&text, at);
        if end == at {
            code.push(text[at]);
            at += 1;
        } else {
            code.extend(text[at..end].iter().map(|&c| if c == '\n' { c } else { ' ' }));
            at = end;
        }
    }
    code
}

/// Where the comment or literal that starts at `at` ends; `at` itself where none starts.
fn end_of_blank(text: &[char], at: usize) -> usize {
    let rest = &text[at..];
    let is_in_word = at > 0 && (text[at - 1].is_alphanumeric() || text[at - 1] == '_');
    match rest {
        ['/', '/', ..] => at + rest.iter().position(|&c| c == '\n').unwrap_or(rest.len()),
        ['/', '*', ..] => at + block_comment_length(rest),
        ['"', ..] => at + 1 + quoted_length(&rest[1..], '"'),
        // A character in quotes, or a lifetime or label, which has no second quote.
        ['\'', '\\', ..] => at + 1 + quoted_length(&rest[1..], '\''),
        ['\'', _, '\'', ..] => at + 3,
        ['r', '"' | '#', ..] if !is_in_word => at + raw_length(rest, 1),
        ['b' | 'c', 'r', '"' | '#', ..] if !is_in_word => at + raw_length(rest, 2),
        _ => at,
    }
}

fn block_comment_length(text: &[char]) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < text.len() {
        match &text[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] if depth == 1 => return at + 2,
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
    }
    at
}

/// Characters up to and with the closing `quote`, of a literal without its opening one.
fn quoted_length(text: &[char], quote: char) -> usize {
    let mut at = 0;
    while at < text.len() && text[at] != quote {
        at += if text[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(text.len())
}

/// Length of the raw string whose prefix (`r`, `br`, `cr`) has `prefix` letters; 0 for `r#name`.
fn raw_length(text: &[char], prefix: usize) -> usize {
    let hashes = text[prefix..].iter().take_while(|&&c| c == '#').count();
    let start = prefix + hashes + 1;
    if text.get(start - 1) != Some(&'"') {
        return 0;
    }
    let is_end = |window: &[char]| window[0] == '"' && window[1..].iter().all(|&c| c == '#');
    let end = text[start..].windows(hashes + 1).position(is_end);
    end.map_or(text.len(), |end| start + end + hashes + 1)
}

/// The identifiers and keywords of a text, each with its place in bytes.
fn identifiers(text: &str) -> impl Iterator<Item = (usize, String)> + '_ {
    let is_inside = |c: char| c.is_alphanumeric() || c == '_';
    let mut at = 0;
    std::iter::from_fn(move || {
        at += text[at..].find(is_inside)?;
        let length = text[at..].find(|c| !is_inside(c)).unwrap_or(text.len() - at);
        let start = at;
        at += length;
        Some((start, text[start..at].to_owned()))
    })
}

/// Names of the functions, types, traits and modules that a file's code declares.
fn declared(code: &str) -> Vec<String> {
    let all: Vec<_> = identifiers(code).map(|(_, word)| word).collect();
    let declares = |word: &str| matches!(word, "fn" | "struct" | "enum" | "union" | "trait" | "type" | "mod");
    all.windows(2).filter(|pair| declares(&pair[0])).map(|pair| pair[1].clone()).collect()
}

/// The words of a name, in lower case: `arena_files` and `ArenaDir` both have "arena".
fn words_of(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    for c in name.chars() {
        if c == '_' || c.is_uppercase() {
            words.push(String::new());
        }
        if c != '_' {
            words.last_mut().expect("never empty").extend(c.to_lowercase());
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[derive(Debug, PartialEq)]
struct Function {
    name: String,
    /// Line of its `fn`, from 1.
    line: usize,
    /// From there to its closing brace.
    len_lines: usize,
}

/// The functions with a body in a file's [code](code_of), in the order of their starts.
fn functions(code: &str) -> Vec<Function> {
    let all: Vec<_> = identifiers(code).collect();
    let named = all.windows(2).filter(|pair| pair[0].1 == "fn").filter_map(|pair| {
        let ((start, _), (name_at, name)) = (&pair[0], &pair[1]);
        // A pointer to a function, `fn(u8)`, has no name.
        if !code[start + 2..*name_at].chars().all(char::is_whitespace) {
            return None;
        }
        let end = name_at + body_end(&code[*name_at..])?;
        let line = code[..*start].matches('\n').count() + 1;
        Some(Function { name: name.clone(), line, len_lines: code[*start..end].matches('\n').count() + 1 })
    });
    named.collect()
}

/// Where the body after a function's signature ends; `None` where a semicolon stands in its place.
fn body_end(code: &str) -> Option<usize> {
    let mut brackets = 0_usize;
    let mut braces = 0_usize;
    for (at, c) in code.char_indices() {
        match c {
            '(' | '[' => brackets += 1,
            ')' | ']' => brackets = brackets.saturating_sub(1),
            // Between brackets it belongs to an array's type, or to a constant.
            ';' if brackets == 0 && braces == 0 => return None,
            '{' => braces += 1,
            '}' if braces == 1 && brackets == 0 => return Some(at + 1),
            '}' => braces = braces.saturating_sub(1),
            _ => {}
        }
    }
    None
}

#[test]
fn comments_and_literals_are_blanked() {
    let text = [
        r#"a("{\"{", '{', '\'', b"{", "#,
        "r#\"{\"{\"#, 'x: loop {}) // {\n",
        "/* { /* { */ { */ &'a r#fn br\"{\\\"",
    ]
    .concat();
    let text = text.as_str();
    let code = code_of(text);
    assert_eq!(code.matches('{').count(), 1, "{code}");
    assert_eq!(code.matches('\n').count(), 1);
    assert_eq!(code.chars().count(), text.chars().count());
    for kept in ["a(", "'x: loop {})", "&'a", "r#fn"] {
        assert!(code.contains(kept), "{kept} in {code}");
    }
}

#[test]
fn functions_are_found_and_measured() {
    let text = r#"/// fn no() {}
fn one() {}
struct S { f: fn(u8) -> u8 }
impl S {
    fn two<T>(
        a: [u8; 4],
    ) -> T
    where
        T: Fn(u8),
    {
        if x { "}" } else { '}' };
        fn inner() {
        }
    }
}
trait T {
    fn none(a: [u8; 3]);
    fn three() -> u8 {
        1
    }
}
"#;
    let found = functions(&code_of(text));
    let expected = [("one", 2, 1), ("two", 5, 10), ("inner", 12, 2), ("three", 18, 3)];
    let expected = expected.map(|(name, line, len_lines)| Function { name: name.into(), line, len_lines });
    assert_eq!(found, expected);
}

#[test]
fn a_long_function_is_seen_as_long() {
    let body = "    let x = \"}\"; // }\n".repeat(FUNCTION_LIMIT_LINES - 1);
    let found = functions(&code_of(&format!("fn long() {{\n{body}}}\n")));
    assert_eq!(found[0].len_lines, FUNCTION_LIMIT_LINES + 1);
}

#[test]
fn names_are_declared_and_split_into_words() {
    let code =
        code_of("pub mod leaf_table;\nstruct ArenaDir;\nfn force() { let window = 1; }\n// struct Pin;\n");
    assert_eq!(declared(&code), ["leaf_table", "ArenaDir", "force"]);
    assert_eq!(words_of("leaf_table"), ["leaf", "table"]);
    assert_eq!(words_of("ArenaDir"), ["arena", "dir"]);
    assert_eq!(module(Path::new("vmm/src/ipc/mod.rs")).as_deref(), Some("ipc"));
    assert_eq!(module(Path::new("vmm/src/ipc/channel.rs")).as_deref(), Some("channel"));
    assert_eq!(module(Path::new("vmm/src/ipc/channel/tests.rs")), None);
}

#[test]
fn tables_and_addresses_may_be_long() {
    for line in ["//! | a | b |", "    /// | a |", "// see https://example.org/a"] {
        assert!(may_be_long(line), "{line}");
    }
    assert!(!may_be_long("let x = a || b;"));
}
