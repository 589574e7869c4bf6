//! The table: one row for each bar, with what was measured, its baseline in the same run, and the verdict.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// What a measure must come to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bar {
    /// This or more.
    Least(f64),
    /// This or less.
    Most(f64),
    /// So much more than the baseline, or less.
    OverAtMost(f64),
    /// So many times the baseline, or more.
    TimesAtLeast(f64),
    /// So many times the baseline, or less.
    TimesAtMost(f64),
}

/// One line of the table.
#[derive(Debug)]
pub(crate) struct Row {
    /// What is measured.
    pub(crate) measure: String,
    /// Of `measured`, `baseline` and the bar.
    pub(crate) unit: &'static str,
    /// What it must come to; `None`: it is there for orientation.
    pub(crate) bar: Option<Bar>,
    /// The figure; a median where there are several rounds.
    pub(crate) measured: f64,
    /// What it is compared with, from the same run.
    pub(crate) baseline: Option<(String, f64)>,
    /// All figures behind it.
    pub(crate) raw: Value,
}

impl Row {
    fn ratio(&self) -> Option<f64> {
        self.baseline.as_ref().map(|(_, baseline)| self.measured / baseline)
    }

    /// Whether the bar is met; `None` without a bar.
    pub(crate) fn meets(&self) -> Option<bool> {
        let ratio = self.ratio().unwrap_or(f64::NAN);
        self.bar.map(|bar| match bar {
            Bar::Least(least) => self.measured >= least,
            Bar::Most(most) => self.measured <= most,
            Bar::OverAtMost(most) => {
                self.baseline.as_ref().is_some_and(|(_, baseline)| self.measured <= baseline + most)
            }
            Bar::TimesAtLeast(least) => ratio >= least,
            Bar::TimesAtMost(most) => ratio <= most,
        })
    }

    fn bar_text(&self) -> String {
        match self.bar {
            None => String::new(),
            Some(Bar::Least(least)) => format!(">= {} {}", figure(least), self.unit),
            Some(Bar::Most(most)) => format!("<= {} {}", figure(most), self.unit),
            Some(Bar::OverAtMost(most)) => format!("<= baseline + {} {}", figure(most), self.unit),
            Some(Bar::TimesAtLeast(least)) => format!(">= {least} x baseline"),
            Some(Bar::TimesAtMost(most)) => format!("<= {most} x baseline"),
        }
    }

    fn verdict(&self) -> &'static str {
        match self.meets() {
            None => "",
            Some(true) => "meets",
            Some(false) => "MISSES",
        }
    }

    fn json(&self) -> Value {
        json!({
            "measure": self.measure,
            "unit": self.unit,
            "bar": self.bar_text(),
            "measured": self.measured,
            "baseline": self.baseline.as_ref().map(|(what, value)| json!({ "what": what, "value": value })),
            "ratio": self.ratio(),
            "verdict": self.verdict(),
            "raw": self.raw,
        })
    }
}

/// All rows of a run.
#[derive(Debug, Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
    failures: Vec<(String, String)>,
}

impl Report {
    /// Adds rows, and shows them at once: a long run is followed by people.
    pub(crate) fn add(&mut self, rows: Vec<Row>) {
        for row in rows {
            println!("  {}", line(&row));
            self.rows.push(row);
        }
    }

    /// Notes that a group could not be measured.
    pub(crate) fn failed(&mut self, group: &str, why: String) {
        println!("  {group}: NOT MEASURED: {why}");
        self.failures.push((group.to_owned(), why));
    }

    /// The table as Markdown.
    pub(crate) fn table(&self) -> String {
        let mut text = String::from(
            "| measure | measured | bar | baseline of the same run | ratio | verdict |\n|---|---|---|---|---|---|\n",
        );
        for row in &self.rows {
            let baseline = match &row.baseline {
                Some((what, value)) => format!("{what}: {} {}", figure(*value), row.unit),
                None => String::new(),
            };
            let ratio = row.ratio().map(|ratio| format!("{ratio:.2}")).unwrap_or_default();
            let _ = writeln!(
                text,
                "| {} | {} {} | {} | {baseline} | {ratio} | {} |",
                row.measure,
                figure(row.measured),
                row.unit,
                row.bar_text(),
                row.verdict()
            );
        }
        for (group, why) in &self.failures {
            let _ = writeln!(text, "| {group} | not measured: {why} | | | | |");
        }
        text
    }

    /// Everything as JSON.
    pub(crate) fn json(&self, machine: Value) -> Value {
        let rows: Vec<_> = self.rows.iter().map(Row::json).collect();
        let failures: Vec<_> =
            self.failures.iter().map(|(group, why)| json!({ "group": group, "why": why })).collect();
        json!({ "machine": machine, "rows": rows, "not_measured": failures })
    }
}

fn line(row: &Row) -> String {
    let baseline = row.baseline.as_ref().map(|(what, value)| format!(" ({what}: {})", figure(*value)));
    format!(
        "{}: {} {}{} [{}] {}",
        row.measure,
        figure(row.measured),
        row.unit,
        baseline.unwrap_or_default(),
        row.bar_text(),
        row.verdict()
    )
}

/// A figure with about three digits that count.
fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 10_000.0 => {
            let digits = format!("{value:.0}");
            let head = digits.len() % 3;
            let mut text = String::new();
            for (index, digit) in digits.chars().enumerate() {
                if index > 0 && index % 3 == head {
                    text.push(',');
                }
                text.push(digit);
            }
            text
        }
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}
