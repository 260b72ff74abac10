//! The report: one HTML page with plots, tables and the host's description. It needs nothing outside of
//! itself, and follows the reader's choice of light or dark.
//!
//! | module | what |
//! |---|---|
//! | `figures` | which plots there are, of which records |
//! | `chart` | plots as SVG |
//! | `scale` | axes and how values are written |
//!
//! A plot without records is left out, so that the report of one benchmark is a page too.

mod chart;
mod figures;
mod scale;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::Value;

use self::chart::escape;
use self::figures::Section;
use self::scale::show;
use super::Findings;
use super::report::{Record, SALP, show_params};

const STYLE: &str = include_str!("style.css");

/// The page.
#[must_use]
pub fn page(findings: &Findings) -> String {
    let Findings { records, host } = findings;
    let mut body = String::new();
    for Section { title, text, figures } in figures::sections(records) {
        if figures.is_empty() {
            continue;
        }
        let _ =
            write!(body, "<section><h2>{}</h2><p>{}</p><div class=\"grid\">", escape(title), escape(text));
        figures.iter().for_each(|figure| body.push_str(figure));
        body.push_str("</div></section>");
    }
    body.push_str(&ratios(records));
    body.push_str(&all_records(records));
    body.push_str(&host_table(host));
    let head = header(records, host);
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>salp bench</title><style>{STYLE}</style></head>\
         <body>{head}<main>{body}</main></body></html>\n"
    )
}

/// A subject as people call it.
fn subject_name(subject: &str) -> &str {
    match subject {
        "process_fork" => "fork()",
        "full_copy" => "full copy",
        "static_template" => "static template",
        "host" => "host alone",
        "bare_vm" => "bare VM",
        "pwrite_memfd" => "pwrite",
        other => other,
    }
}

fn text_of<'a>(host: &'a Value, path: &str) -> &'a str {
    host.pointer(path).and_then(Value::as_str).unwrap_or("unknown")
}

/// Title, where it was measured, and a few figures.
fn header(records: &[Record], host: &Value) -> String {
    let mut cards = String::new();
    for (label, record) in figures::highlights(records) {
        let others =
            records.iter().filter(|other| is_compared(other, record)).min_by(|a, b| a.p50.total_cmp(&b.p50));
        let beside = others.map_or_else(String::new, |other| {
            format!("best other: {} {}", subject_name(&other.subject), show(other.unit, other.p50))
        });
        let _ = write!(
            cards,
            "<div class=\"card\"><span>{}</span><strong>{}</strong><em>{}</em></div>",
            escape(&label),
            escape(&show(record.unit, record.p50)),
            escape(&beside)
        );
    }
    let command = escape(text_of(host, "/command"));
    format!(
        "<header><h1>salp bench</h1><p>What a clone of a running microVM costs, against other ways to \
         a second one. Marks are medians; whiskers go to the 90th percentile.</p><pre>{command}</pre>\
         <div class=\"cards\">{cards}</div></header>"
    )
}

fn is_compared(other: &Record, salp: &Record) -> bool {
    let waits = |record: &Record| {
        let mut params = record.params.clone();
        params.remove("source");
        params
    };
    other.subject != SALP && other.quantity == salp.quantity && waits(other) == waits(salp)
}

/// Whether figures of this quantity are ones of the same thing.
fn is_comparable(quantity: &str) -> bool {
    !quantity.starts_with("stage.") && quantity != "order_trip"
}

/// salp's medians, and how many times as much the others take.
fn ratios(records: &[Record]) -> String {
    let mut subjects: Vec<&str> = Vec::new();
    let mut rows: Vec<(&Record, BTreeMap<&str, &Record>)> = Vec::new();
    for salp in records.iter().filter(|record| record.subject == SALP && is_comparable(&record.quantity)) {
        let others = records
            .iter()
            .filter(|other| other.subject != SALP && other.quantity == salp.quantity)
            .filter(|other| other.params == salp.params);
        let others: BTreeMap<_, _> = others.map(|other| (other.subject.as_str(), other)).collect();
        for subject in others.keys() {
            if !subjects.contains(subject) {
                subjects.push(subject);
            }
        }
        if !others.is_empty() {
            rows.push((salp, others));
        }
    }
    if rows.is_empty() {
        return String::new();
    }
    let heads = subjects.iter().map(|subject| format!("<th>{}</th>", escape(subject_name(subject))));
    let heads: String = heads.collect();
    let mut text = format!(
        "<section><h2>Ratios</h2><p>Medians; in brackets how many times salp's. Above 1 the other is larger, \
         which is worse for all but rates and throughput.</p><div class=\"wide\"><table><thead><tr>\
         <th>quantity</th><th>parameters</th><th>salp</th>{heads}</tr></thead><tbody>"
    );
    for (salp, others) in rows {
        let _ = write!(
            text,
            "<tr><td>{}</td><td>{}</td><td class=\"n\"><b>{}</b></td>",
            escape(&salp.quantity),
            escape(&show_params(&salp.params)),
            escape(&show(salp.unit, salp.p50))
        );
        for subject in &subjects {
            let cell = others.get(subject).map_or_else(String::new, |other| cell(salp, other));
            let _ = write!(text, "<td class=\"n\">{cell}</td>");
        }
        text.push_str("</tr>");
    }
    text + "</tbody></table></div></section>"
}

fn cell(salp: &Record, other: &Record) -> String {
    let value = escape(&show(other.unit, other.p50));
    if salp.p50 <= 0.0 || other.p50 <= 0.0 {
        return value;
    }
    let ratio = other.p50 / salp.p50;
    format!("{value} <small>(×{})</small>", scale::digits(ratio))
}

/// All records, for those who ask.
fn all_records(records: &[Record]) -> String {
    let mut text = String::from(
        "<section><details><summary>All records</summary><div class=\"wide\"><table><thead><tr>\
         <th>quantity</th><th>subject</th><th>parameters</th><th>n</th><th>min</th><th>p50</th><th>p90</th>\
         <th>p99</th><th>max</th></tr></thead><tbody>",
    );
    for record in records {
        let _ = write!(
            text,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td class=\"n\">{}</td>",
            escape(&record.quantity),
            escape(subject_name(&record.subject)),
            escape(&show_params(&record.params)),
            record.n
        );
        for value in [record.min, record.p50, record.p90, record.p99, record.max] {
            let _ = write!(text, "<td class=\"n\">{}</td>", escape(&show(record.unit, value)));
        }
        text.push_str("</tr>");
    }
    text + "</tbody></table></div></details></section>"
}

/// The host record, flat.
fn host_table(host: &Value) -> String {
    let mut text = String::from("<section><h2>Host</h2><dl>");
    let mut put = |name: &str, value: &Value| {
        let value = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let _ = write!(text, "<dt>{}</dt><dd>{}</dd>", escape(&name.replace('_', " ")), escape(&value));
    };
    for (name, value) in host.as_object().into_iter().flatten() {
        match value.as_object() {
            Some(inner) => inner.iter().for_each(|(name, value)| put(name, value)),
            None => put(name, value),
        }
    }
    text + "</dl></section>"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::{Params, Samples, Unit};

    #[test]
    fn a_page_needs_nothing_outside_and_names_its_host() {
        let mut samples = Samples::default();
        let params = Params::from([
            ("memory".to_owned(), Value::from("128M")),
            ("huge".to_owned(), Value::from("on")),
            ("dirty".to_owned(), Value::from("all")),
            ("source".to_owned(), Value::from("waiting")),
        ]);
        for (subject, us) in [(SALP, 300.0), ("process_fork", 600.0)] {
            for quantity in ["pause", "fork_call"] {
                samples.add(quantity, subject, &params, Unit::Microseconds, us);
            }
        }
        let host =
            serde_json::json!({ "command": "salp bench <fork>", "host": { "kernel_release": "6.18" } });
        let page = page(&Findings { records: samples.records(), host });
        assert!(page.contains("salp bench &lt;fork&gt;") && page.contains("6.18"), "{page}");
        assert!(page.contains("<polyline") && page.contains("(×2)"), "{page}");
        for outside in ["http://", "https://", "src=", "href=", "@import", "url("] {
            assert!(!page.contains(outside), "it refers to {outside}");
        }
        let open = page.matches("<svg").count();
        assert!(open > 0 && open == page.matches("</svg>").count());
    }

    #[test]
    fn nothing_measured_is_a_page_too() {
        let page = page(&Findings { records: Vec::new(), host: Value::Null });
        assert!(page.ends_with("</html>\n") && !page.contains("<svg"));
    }
}
