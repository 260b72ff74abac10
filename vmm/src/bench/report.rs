//! Records: what a benchmark measured, as JSON, CSV and a table.
//!
//! A [`Samples`] collects single figures by (quantity, subject, parameters); [`Samples::records`]
//! makes of each series one [`Record`] with exact percentiles (nearest rank). Nothing is left out of a
//! series but the warm-up run, which never gets here.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Parameters of a figure, by name.
pub type Params = BTreeMap<String, Value>;

/// A unit of figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    /// Microseconds.
    #[serde(rename = "us")]
    Microseconds,
    /// Microseconds for each page of 4 KiB.
    #[serde(rename = "us/page")]
    MicrosecondsPerPage,
    /// Mebibytes a second.
    #[serde(rename = "MiB/s")]
    MebibytesPerSecond,
    /// Kibibytes.
    #[serde(rename = "KiB")]
    Kibibytes,
    /// Hundredths of what it is compared with.
    #[serde(rename = "%")]
    Percent,
    /// A number of things.
    #[serde(rename = "count")]
    Count,
}

impl Unit {
    const fn name(self) -> &'static str {
        match self {
            Self::Microseconds => "us",
            Self::MicrosecondsPerPage => "us/page",
            Self::MebibytesPerSecond => "MiB/s",
            Self::Kibibytes => "KiB",
            Self::Percent => "%",
            Self::Count => "count",
        }
    }
}

/// One series.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What was measured.
    pub quantity: String,
    /// Whose figure it is: `salp`, or a baseline.
    pub subject: String,
    /// With what parameters.
    pub params: Params,
    /// The unit of what follows.
    pub unit: Unit,
    /// How many figures.
    pub n: usize,
    /// The least.
    pub min: f64,
    /// The median.
    pub p50: f64,
    /// Nine of ten are not above it.
    pub p90: f64,
    /// 99 of 100 are not above it: the greatest where there are fewer than 100.
    pub p99: f64,
    /// The greatest.
    pub max: f64,
}

struct Series {
    quantity: String,
    subject: String,
    params: Params,
    unit: Unit,
    values: Vec<f64>,
}

/// Figures as they come.
#[derive(Default)]
pub struct Samples(Vec<Series>);

impl Samples {
    /// Adds one figure.
    pub fn add(&mut self, quantity: &str, subject: &str, params: &Params, unit: Unit, value: f64) {
        let is_its =
            |one: &&mut Series| one.quantity == quantity && one.subject == subject && one.params == *params;
        match self.0.iter_mut().find(is_its) {
            Some(series) => series.values.push(value),
            None => self.0.push(Series {
                quantity: quantity.to_owned(),
                subject: subject.to_owned(),
                params: params.clone(),
                unit,
                values: vec![value],
            }),
        }
    }

    /// A record for each series. What is compared stands together: quantities, in each parameters, in
    /// each subjects, all in the order in which they were first there.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        let first = |is: &dyn Fn(&Series) -> bool| self.0.iter().position(is);
        let mut series: Vec<_> = self.0.iter().collect();
        series.sort_by_cached_key(|one| {
            (first(&|other| other.quantity == one.quantity), first(&|other| other.params == one.params))
        });
        series.into_iter().map(record).collect()
    }
}

fn record(series: &Series) -> Record {
    let mut sorted = series.values.clone();
    sorted.sort_by(f64::total_cmp);
    let at = |percent| percentile(&sorted, percent);
    Record {
        quantity: series.quantity.clone(),
        subject: series.subject.clone(),
        params: series.params.clone(),
        unit: series.unit,
        n: sorted.len(),
        min: at(0),
        p50: at(50),
        p90: at(90),
        p99: at(99),
        max: at(100),
    }
}

/// The nearest-rank percentile: the least value that at least `percent` of all do not exceed.
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

/// All records and the host's, as a JSON list.
///
/// # Errors
/// A figure that JSON has no form for.
pub fn json(records: &[Record], host: &Value) -> Result<String, serde_json::Error> {
    let mut list = records.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>()?;
    list.push(serde_json::json!({ "host": host }));
    serde_json::to_string_pretty(&list)
}

/// What [`json`] has written.
///
/// # Errors
/// It is not that.
pub fn from_json(text: &str) -> Result<(Vec<Record>, Value), serde_json::Error> {
    let mut list: Vec<Value> = serde_json::from_str(text)?;
    let host = list.pop().and_then(|mut last| last.get_mut("host").map(Value::take)).unwrap_or(Value::Null);
    Ok((list.into_iter().map(serde_json::from_value).collect::<Result<_, _>>()?, host))
}

/// The records as CSV, parameters in one column as `name=value` words.
#[must_use]
pub fn csv(records: &[Record]) -> String {
    let mut text = "quantity,subject,params,unit,n,min,p50,p90,p99,max\n".to_owned();
    for record in records {
        let Record { quantity, subject, unit, n, min, p50, p90, p99, max, .. } = record;
        let (params, unit) = (show_params(&record.params), unit.name());
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{quantity},{subject},{params},{unit},{n},{min:.4},{p50:.4},{p90:.4},{p99:.4},{max:.4}"
        );
    }
    text
}

/// The records as a table for people. Where a baseline measured the same with the same parameters, the
/// last column says how many times salp's median it is.
#[must_use]
pub fn table(records: &[Record]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{:<24} {:<16} {:<40} {:>7} {:>4} {:>10} {:>10} {:>10} {:>10}  vs salp",
        "quantity", "subject", "parameters", "unit", "n", "p50", "p90", "p99", "max"
    );
    for record in records {
        let _ = writeln!(
            text,
            "{:<24} {:<16} {:<40} {:>7} {:>4} {:>10} {:>10} {:>10} {:>10}  {}",
            record.quantity,
            record.subject,
            show_params(&record.params),
            record.unit.name(),
            record.n,
            show(record.p50),
            show(record.p90),
            show(record.p99),
            show(record.max),
            ratio(records, record).map_or_else(String::new, |ratio| format!("x{ratio:.2}")),
        );
    }
    text
}

/// Of a baseline's figure to salp's.
fn ratio(records: &[Record], of: &Record) -> Option<f64> {
    let is_salps =
        |one: &&Record| one.subject == SALP && one.quantity == of.quantity && one.params == of.params;
    let salp = records.iter().find(is_salps)?;
    // Stages of one name are parts of different wholes, and an order's own cost is no figure of merit.
    let is_comparable = !of.quantity.starts_with("stage.") && of.quantity != "order_trip";
    (is_comparable && of.subject != SALP && salp.p50 > 0.0 && of.p50 > 0.0).then(|| of.p50 / salp.p50)
}

/// The subject of salp's own figures.
pub const SALP: &str = "salp";
/// The subject of what the host takes whoever asks.
pub const HOST: &str = "host";

/// Three digits that count, where there are fractions at all.
fn show(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value if value >= 1.0 => format!("{value:.2}"),
        value => format!("{value:.3}"),
    }
}

pub(super) fn show_params(params: &Params) -> String {
    let word = |(name, value): (&String, &Value)| match value {
        Value::String(text) => format!("{name}={text}"),
        other => format!("{name}={other}"),
    };
    params.iter().map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        let mut samples = Samples::default();
        for value in values {
            samples.add("pause", SALP, &Params::new(), Unit::Microseconds, *value);
        }
        samples
    }

    #[test]
    fn percentiles_are_figures_that_were_measured() {
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        let record = samples(&hundred).records().remove(0);
        let found = [record.min, record.p50, record.p90, record.p99, record.max];
        assert_eq!((record.n, found), (100, [1.0, 50.0, 90.0, 99.0, 100.0]));
        let record = samples(&[7.0]).records().remove(0);
        assert_eq!([record.min, record.p50, record.p99, record.max], [7.0; 4]);
        let record = samples(&[3.0, 1.0, 2.0]).records().remove(0);
        assert_eq!([record.min, record.p50, record.p90, record.max], [1.0, 2.0, 3.0, 3.0]);
    }

    #[test]
    fn series_are_told_apart_by_quantity_subject_and_parameters() {
        let mut samples = samples(&[1.0]);
        let params = Params::from([("memory".to_owned(), Value::from("128M"))]);
        samples.add("pause", SALP, &params, Unit::Microseconds, 2.0);
        samples.add("pause", "fork", &params, Unit::Microseconds, 6.0);
        samples.add("fork_call", "fork", &params, Unit::Microseconds, 3.0);
        let records = samples.records();
        assert_eq!(records.iter().map(|record| record.n).collect::<Vec<_>>(), [1; 4]);
        let found: Vec<_> = records.iter().map(|record| record.subject.as_str()).collect();
        assert_eq!(found, [SALP, SALP, "fork", "fork"]);
        assert_eq!(ratio(&records, &records[2]), Some(3.0));
        assert_eq!(ratio(&records, &records[3]), None, "salp has no such figure");
        assert!(table(&records).lines().any(|line| line.ends_with("x3.00")));
    }

    #[test]
    fn records_survive_json() {
        let records = samples(&[1.5, 2.5]).records();
        let text = json(&records, &serde_json::json!({ "kernel": "any" })).expect("plain figures");
        let (read, host) = from_json(&text).expect("as written");
        assert_eq!((read, &host["kernel"]), (records.clone(), &Value::from("any")));
        assert_eq!(csv(&records).lines().count(), 2);
    }
}
