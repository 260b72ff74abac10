//! Plots as inline SVG: lines, bars beside each other, and stacked bars.
//!
//! Colours and dashes are classes of the page's style, so that one plot serves light and dark. A mark
//! is a median, the whisker above it goes to the 90th percentile, and pointing at it tells all figures.

use std::fmt::Write as _;

use super::scale::{Scale, show};
use crate::bench::report::{Record, Unit};

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 330.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 46.0;
/// Labels on the horizontal axis that are nearer than this are left out.
const LABEL_GAP: f64 = 34.0;

/// A figure with its whisker.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    pub(super) p50: f64,
    pub(super) p90: f64,
    /// What pointing at it tells.
    pub(super) said: String,
}

impl Mark {
    pub(super) fn of(record: &Record) -> Self {
        let Record { unit, p50, p90, p99, max, n, .. } = record;
        let [p50_is, p90_is, p99_is, max_is] = [p50, p90, p99, max].map(|value| show(*unit, *value));
        let said = format!("p50 {p50_is}, p90 {p90_is}, p99 {p99_is}, max {max_is}, n {n}");
        Self { p50: *p50, p90: *p90, said }
    }
}

/// A line: its name, the class that it is drawn with, and its marks by place.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) class: &'static str,
    pub(super) marks: Vec<(f64, Mark)>,
}

/// Bars of one colour: one for each group that has it.
#[derive(Clone, Debug)]
pub(super) struct Bars {
    pub(super) name: String,
    pub(super) class: &'static str,
    pub(super) marks: Vec<Option<Mark>>,
}

/// A stacked bar: its name, and its parts' values.
#[derive(Clone, Debug)]
pub(super) struct Stack {
    pub(super) name: String,
    pub(super) parts: Vec<f64>,
}

/// How a vertical axis goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Axis {
    Even,
    Logarithmic,
}

/// Text that is safe in HTML and SVG.
pub(super) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            c => safe.push(c),
        }
    }
    safe
}

/// An SVG that is being drawn.
struct Drawing(String);

impl Drawing {
    fn new(height: f64, title: &str, class: &str) -> Self {
        let title = escape(title);
        Self(format!(
            "<svg class=\"{class}\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\">"
        ))
    }

    fn put(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = self.0.write_fmt(element);
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let text = escape(text);
        self.put(format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"));
    }

    fn line(&mut self, class: &str, [x1, y1]: [f64; 2], [x2, y2]: [f64; 2]) {
        self.put(format_args!(
            "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
        ));
    }

    /// The marks of the vertical axis and their lines.
    fn vertical_axis(&mut self, scale: &Scale, unit: Unit) {
        for mark in scale.marks(unit) {
            let y = scale.at(mark);
            self.line("grid", [LEFT, y], [WIDTH - RIGHT, y]);
            self.text(LEFT - 8.0, y + 4.0, "end", &show(unit, mark));
        }
        self.line("axis", [LEFT, HEIGHT - BOTTOM], [WIDTH - RIGHT, HEIGHT - BOTTOM]);
    }

    fn horizontal_title(&mut self, title: &str) {
        self.text(f64::midpoint(LEFT, WIDTH - RIGHT), HEIGHT - 8.0, "middle", title);
    }

    /// The whisker of a mark at `x`.
    fn whisker(&mut self, class: &str, x: f64, from: f64, to: f64) {
        if from - to > 1.0 {
            let class = format!("whisker {class}");
            self.line(&class, [x, from], [x, to]);
            self.line(&class, [x - 4.0, to], [x + 4.0, to]);
        }
    }

    /// A mark whose form says as much as its colour.
    fn point(&mut self, class: &str, x: f64, y: f64, said: &str) {
        let form = form(class, x, y, 4.6);
        let said = escape(said);
        self.put(format_args!("<g class=\"point {class}\"><title>{said}</title>{form}</g>"));
    }

    fn end(mut self) -> String {
        self.0.push_str("</svg>");
        self.0
    }
}

/// The outline of a mark.
fn form(class: &str, x: f64, y: f64, r: f64) -> String {
    let path = |points: &[[f64; 2]]| {
        let points = points.iter().map(|[dx, dy]| format!("{:.1},{:.1}", x + dx * r, y + dy * r));
        format!("<polygon points=\"{}\"/>", points.collect::<Vec<_>>().join(" "))
    };
    match class.split(' ').next().unwrap_or_default() {
        "fork" => path(&[[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]]),
        "copy" => path(&[[0.0, -1.2], [1.1, 0.9], [-1.1, 0.9]]),
        "template" => path(&[[0.0, -1.3], [1.3, 0.0], [0.0, 1.3], [-1.3, 0.0]]),
        "snapshot" => path(&[[0.0, 1.2], [1.1, -0.9], [-1.1, -0.9]]),
        _ => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{r:.1}\"/>"),
    }
}

/// What a legend shows of a colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    Line,
    Bar,
}

/// A legend: names with what they are drawn with.
pub(super) fn legend<'a>(key: Key, entries: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut text = String::from("<ul class=\"legend\">");
    for (name, class) in entries {
        let form = if key == Key::Bar {
            "<rect x=\"3\" y=\"2\" width=\"12\" height=\"10\" rx=\"2\"/>".to_owned()
        } else {
            format!("<line x1=\"0\" y1=\"7\" x2=\"18\" y2=\"7\"/>{}", form(class, 9.0, 7.0, 4.6))
        };
        let _ = write!(
            text,
            "<li><svg class=\"key {class}\" width=\"18\" height=\"14\" aria-hidden=\"true\">{form}\
             </svg>{}</li>",
            escape(name)
        );
    }
    text + "</ul>"
}

/// Lines over the places in `ticks`.
pub(super) fn lines(
    title: &str,
    below: &str,
    unit: Unit,
    axis: Axis,
    ticks: &[(f64, String)],
    lines: &[Line],
) -> String {
    let values: Vec<_> =
        lines.iter().flat_map(|line| &line.marks).flat_map(|(_, m)| [m.p50, m.p90]).collect();
    let vertical = vertical_scale(axis, &values);
    let least = ticks.iter().map(|tick| tick.0).fold(f64::INFINITY, f64::min);
    let most = ticks.iter().map(|tick| tick.0).fold(f64::NEG_INFINITY, f64::max);
    let (from, to) = (LEFT + 30.0, WIDTH - RIGHT - 30.0);
    let across = |x: f64| match most > least {
        true => from + (to - from) * (x - least) / (most - least),
        false => f64::midpoint(from, to),
    };
    let mut drawing = Drawing::new(HEIGHT, title, "lines");
    drawing.vertical_axis(&vertical, unit);
    let mut last = f64::NEG_INFINITY;
    for (place, label) in ticks {
        let x = across(*place);
        drawing.line("axis", [x, HEIGHT - BOTTOM], [x, HEIGHT - BOTTOM + 4.0]);
        if x - last >= LABEL_GAP {
            drawing.text(x, HEIGHT - BOTTOM + 18.0, "middle", label);
            last = x;
        }
    }
    drawing.horizontal_title(below);
    // The last is drawn above the others: the first matters most.
    for line in lines.iter().rev() {
        let class = line.class;
        let points =
            line.marks.iter().map(|(x, mark)| format!("{:.1},{:.1}", across(*x), vertical.at(mark.p50)));
        let points = points.collect::<Vec<_>>().join(" ");
        drawing.put(format_args!("<polyline class=\"path {class}\" points=\"{points}\"/>"));
        for (place, mark) in &line.marks {
            let (x, y) = (across(*place), vertical.at(mark.p50));
            drawing.whisker(class, x, y, vertical.at(mark.p90));
            drawing.point(class, x, y, &format!("{}: {}", line.name, mark.said));
        }
    }
    drawing.end()
}

fn vertical_scale(axis: Axis, values: &[f64]) -> Scale {
    match axis {
        Axis::Even => Scale::even(values, HEIGHT - BOTTOM, TOP),
        Axis::Logarithmic => Scale::logarithmic(values, HEIGHT - BOTTOM, TOP),
    }
}

/// Bars in groups.
pub(super) fn bars(
    title: &str,
    below: &str,
    unit: Unit,
    axis: Axis,
    groups: &[String],
    bars: &[Bars],
) -> String {
    let values: Vec<_> =
        bars.iter().flat_map(|one| one.marks.iter().flatten()).flat_map(|m| [m.p50, m.p90]).collect();
    let vertical = vertical_scale(axis, &values);
    let mut drawing = Drawing::new(HEIGHT, title, "bars");
    drawing.vertical_axis(&vertical, unit);
    let group_width = (WIDTH - RIGHT - LEFT) / groups.len().max(1) as f64;
    for (number, group) in groups.iter().enumerate() {
        let left = LEFT + group_width * number as f64;
        drawing.text(left + group_width / 2.0, HEIGHT - BOTTOM + 18.0, "middle", group);
        // Only those that are there take room.
        let there: Vec<_> =
            bars.iter().filter_map(|one| Some((one, one.marks.get(number)?.as_ref()?))).collect();
        let width = (group_width * 0.8 / there.len().max(1) as f64).min(46.0);
        let begin = left + (group_width - width * there.len() as f64) / 2.0;
        for (place, (one, mark)) in there.iter().enumerate() {
            let x = begin + width * place as f64;
            let (top, base) = (vertical.at(mark.p50), HEIGHT - BOTTOM);
            let said = escape(&format!("{}, {group}: {}", one.name, mark.said));
            let (class, shown, height) = (one.class, width - 3.0, base - top);
            drawing.put(format_args!(
                "<rect class=\"bar {class}\" x=\"{x:.1}\" y=\"{top:.1}\" width=\"{shown:.1}\" \
                 height=\"{height:.1}\" rx=\"2\"><title>{said}</title></rect>"
            ));
            let middle = x + shown / 2.0;
            drawing.whisker("bare-line", middle, top, vertical.at(mark.p90));
            if width >= 34.0 {
                let above = vertical.at(mark.p90.max(mark.p50)) - 5.0;
                drawing.put(format_args!(
                    "<text class=\"value\" x=\"{middle:.1}\" y=\"{above:.1}\" \
                     text-anchor=\"middle\">{}</text>",
                    escape(&show(unit, mark.p50))
                ));
            }
        }
    }
    drawing.horizontal_title(below);
    drawing.end()
}

/// Bars that lie, made of parts: the class of part `i` is `stage{i}`.
pub(super) fn stacks(title: &str, unit: Unit, parts: &[&str], stacks: &[Stack]) -> String {
    const ROW: f64 = 34.0;
    const NAMES: f64 = 150.0;
    let height = TOP + ROW * stacks.len() as f64 + 34.0;
    let sums: Vec<f64> = stacks.iter().map(|stack| stack.parts.iter().sum()).collect();
    let scale = Scale::even(&sums, NAMES, WIDTH - RIGHT - 58.0);
    let mut drawing = Drawing::new(height, title, "stacks");
    let bottom = height - 30.0;
    for mark in scale.marks(unit) {
        let x = scale.at(mark);
        drawing.line("grid", [x, TOP], [x, bottom]);
        drawing.text(x, bottom + 17.0, "middle", &show(unit, mark));
    }
    for (row, (stack, sum)) in stacks.iter().zip(&sums).enumerate() {
        let y = TOP + ROW * row as f64 + 6.0;
        drawing.text(NAMES - 10.0, y + 15.0, "end", &stack.name);
        let mut done = 0.0;
        for (number, (part, value)) in parts.iter().zip(&stack.parts).enumerate() {
            let (from, to) = (scale.at(done), scale.at(done + value));
            done += value;
            let width = to - from;
            let said = escape(&format!("{}: {part} {}", stack.name, show(unit, *value)));
            drawing.put(format_args!(
                "<rect class=\"bar stage{number}\" x=\"{from:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" \
                 height=\"22\"><title>{said}</title></rect>"
            ));
        }
        drawing.text(scale.at(*sum) + 6.0, y + 15.0, "start", &show(unit, *sum));
    }
    drawing.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(p50: f64) -> Mark {
        Mark { p50, p90: p50 * 1.5, said: "a < b".to_owned() }
    }

    #[test]
    fn plots_are_closed_and_safe() {
        let line =
            Line { name: "x & y".to_owned(), class: "salp", marks: vec![(1.0, mark(3.0)), (2.0, mark(0.0))] };
        let ticks = [(1.0, "1".to_owned()), (2.0, "<2>".to_owned())];
        let bar = Bars { name: "x".to_owned(), class: "fork", marks: vec![Some(mark(3.0)), None] };
        let groups = ["one".to_owned(), "two".to_owned()];
        let stack = Stack { name: "s".to_owned(), parts: vec![1.0, 2.0] };
        for axis in [Axis::Even, Axis::Logarithmic] {
            for svg in [
                lines("t", "b", Unit::Microseconds, axis, &ticks, std::slice::from_ref(&line)),
                bars("t", "b", Unit::Kibibytes, axis, &groups, std::slice::from_ref(&bar)),
                stacks("t", Unit::Microseconds, &["p", "q"], std::slice::from_ref(&stack)),
                lines("t", "b", Unit::Count, axis, &[], &[]),
            ] {
                assert!(svg.starts_with("<svg") && svg.ends_with("</svg>"), "{svg}");
                assert!(!svg.contains("NaN") && !svg.contains("inf") && !svg.contains("a < b"), "{svg}");
            }
        }
    }
}
