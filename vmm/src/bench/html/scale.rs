//! Axes: where a value lies, which values are marked, and how values are written.

use crate::bench::report::Unit;

/// Maps values to coordinates, evenly or by their logarithms.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    is_log: bool,
    least: f64,
    most: f64,
    from: f64,
    to: f64,
}

/// On a logarithmic axis there is nothing below this.
const LEAST_POSITIVE: f64 = 1e-4;

impl Scale {
    /// An axis from 0 that has room for all of `values`, from coordinate `from` to `to`.
    pub(super) fn even(values: &[f64], from: f64, to: f64) -> Self {
        let most = values.iter().copied().fold(0.0, f64::max);
        let most = if most > 0.0 { most * 1.05 } else { 1.0 };
        Self { is_log: false, least: 0.0, most, from, to }
    }

    /// A logarithmic axis for the positive ones of `values`.
    pub(super) fn logarithmic(values: &[f64], from: f64, to: f64) -> Self {
        let positive = || values.iter().copied().filter(|value| *value > LEAST_POSITIVE);
        let least = positive().fold(f64::INFINITY, f64::min);
        let most = positive().fold(0.0, f64::max);
        if most <= 0.0 {
            return Self { is_log: true, least: 1.0, most: 10.0, from, to };
        }
        // Room below, so that the least value is no empty bar.
        Self { is_log: true, least: least / 1.8, most: most * 1.25, from, to }
    }

    /// The coordinate of a value; what lies outside is moved to the edge.
    pub(super) fn at(&self, value: f64) -> f64 {
        let value = value.clamp(self.least, self.most);
        let part = if self.is_log {
            (value / self.least).ln() / (self.most / self.least).ln()
        } else {
            (value - self.least) / (self.most - self.least)
        };
        self.from + (self.to - self.from) * part
    }

    /// Round values to mark, in that unit, ascending, seven or so at most.
    pub(super) fn marks(&self, unit: Unit) -> Vec<f64> {
        // Sizes are round in the unit that they are written in.
        let (is_binary, step) = (matches!(unit, Unit::Kibibytes | Unit::MebibytesPerSecond), 1024.0);
        let factor = if is_binary && self.most >= step { step } else { 1.0 };
        let factor = if is_binary && self.most >= step * step { step * step } else { factor };
        if !self.is_log {
            return even_marks(self.most / factor).into_iter().map(|mark| mark * factor).collect();
        }
        let decades = (self.most / self.least).log10();
        let (base, digits): (f64, &[f64]) = match decades {
            _ if is_binary => (4.0, &[1.0]),
            decades if decades > 3.0 => (10.0, &[1.0]),
            decades if decades > 1.8 => (10.0, &[1.0, 3.0]),
            _ => (10.0, &[1.0, 2.0, 5.0]),
        };
        let first = self.least.log(base).floor() as i32;
        let last = self.most.log(base).ceil() as i32;
        let marks = (first..=last).flat_map(|power| digits.iter().map(move |d| d * base.powi(power)));
        marks.filter(|mark| *mark >= self.least && *mark <= self.most).collect()
    }
}

/// Round values from 0 to `most`.
fn even_marks(most: f64) -> Vec<f64> {
    let power = 10_f64.powf((most / 6.0).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power);
    let step = steps.into_iter().find(|step| most / step <= 6.0).unwrap_or(most);
    (0..=6).map(|i| f64::from(i) * step).take_while(|mark| *mark <= most).collect()
}

/// A value with its unit, as people write it: three digits that count, and a space that does not break.
pub(super) fn show(unit: Unit, value: f64) -> String {
    match unit {
        _ if value == 0.0 => "0".to_owned(),
        Unit::Microseconds | Unit::MicrosecondsPerPage => {
            let (scaled, name) = match value.abs() {
                size if size < 1.0 => (value * 1e3, "ns"),
                size if size < 1e3 => (value, "µs"),
                size if size < 1e6 => (value / 1e3, "ms"),
                _ => (value / 1e6, "s"),
            };
            format!("{}\u{a0}{name}", digits(scaled))
        }
        Unit::Kibibytes => {
            let (scaled, name) = match value.abs() {
                size if size < 1024.0 => (value, "KiB"),
                size if size < 1024.0 * 1024.0 => (value / 1024.0, "MiB"),
                _ => (value / 1024.0 / 1024.0, "GiB"),
            };
            format!("{}\u{a0}{name}", digits(scaled))
        }
        Unit::MebibytesPerSecond if value >= 1024.0 => format!("{}\u{a0}GiB/s", digits(value / 1024.0)),
        Unit::MebibytesPerSecond => format!("{}\u{a0}MiB/s", digits(value)),
        Unit::Percent => format!("{}\u{a0}%", digits(value)),
        Unit::Count => digits(value),
    }
}

/// Three digits that count, no zeros behind the point.
pub(super) fn digits(value: f64) -> String {
    let text = match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    };
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_written_with_three_digits() {
        let show = |unit, value| show(unit, value).replace('\u{a0}', " ");
        let us = |value| show(Unit::Microseconds, value);
        assert_eq!([us(0.058), us(5.0), us(1234.0), us(2.5e6)], ["58 ns", "5 µs", "1.23 ms", "2.5 s"]);
        assert_eq!(show(Unit::Kibibytes, 1536.0), "1.5 MiB");
        assert_eq!(show(Unit::Percent, 97.25), "97.2 %");
    }

    #[test]
    fn marks_are_round_and_inside() {
        let even = Scale::even(&[734.0], 0.0, 100.0);
        assert_eq!(even.marks(Unit::Microseconds), [0.0, 200.0, 400.0, 600.0]);
        let sizes = Scale::even(&[3000.0], 0.0, 1.0).marks(Unit::Kibibytes);
        assert_eq!(sizes[..3], [0.0, 1024.0, 2048.0]);
        assert_eq!((even.at(0.0), even.at(1e9)), (0.0, 100.0));
        let logarithmic = Scale::logarithmic(&[0.0, 3.0, 250_000.0], 100.0, 0.0);
        assert_eq!(logarithmic.marks(Unit::Microseconds), [10.0, 100.0, 1e3, 1e4, 1e5]);
        assert!(logarithmic.at(3.0) > logarithmic.at(4.0));
        assert_eq!(logarithmic.at(0.0), 100.0);
        for values in [vec![], vec![0.0], vec![-3.0]] {
            for scale in [Scale::even(&values, 0.0, 1.0), Scale::logarithmic(&values, 0.0, 1.0)] {
                assert!(!scale.marks(Unit::Count).is_empty() && scale.at(0.5).is_finite(), "{values:?}");
            }
        }
    }
}
