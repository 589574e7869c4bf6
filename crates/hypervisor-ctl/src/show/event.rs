//! Events as rows.

use std::time::SystemTime;

use hv_proto::v1;

use crate::output::table::{Cell, Table, Tone};
use crate::output::text::{age, escape, moment};
use crate::output::{Output, OutputFormat};

/// Prints events as rows.
#[derive(Debug)]
pub(crate) struct EventTable {
    table: Table,
    wide: bool,
}

impl EventTable {
    pub(crate) fn new(output: Output) -> Self {
        let wide = output.format == OutputFormat::Wide;
        let mut titles = vec![if wide { "TIME" } else { "AGE" }, "LEVEL", "REASON", "OBJECT"];
        if wide {
            titles.extend(["SOURCE", "REQUEST"]);
        }
        titles.push("MESSAGE");
        Self { table: Table::new(titles, output.colours), wide }
    }

    /// For a watch: leaves room for what will come.
    pub(crate) fn for_watch(output: Output) -> Self {
        let mut watch = Self::new(output);
        watch.table.reserve(&[("LEVEL", 7), ("REASON", 16), ("OBJECT", 18)]);
        watch
    }

    /// The rows as lines.
    pub(crate) fn render(&mut self, events: &[v1::Event], now: SystemTime) -> String {
        let rows: Vec<Vec<Cell>> = events.iter().map(|event| self.row(event, now)).collect();
        self.table.render(&rows)
    }

    fn row(&self, event: &v1::Event, now: SystemTime) -> Vec<Cell> {
        let name = if event.object_name.is_empty() { &event.object_id } else { &event.object_name };
        let when = if self.wide { moment(event.at.as_ref()) } else { age(event.at.as_ref(), now) };
        let level = if event.warning { Cell::toned("warning", Tone::Busy) } else { "normal".into() };
        let mut row: Vec<Cell> = vec![
            when.into(),
            level,
            escape(&event.reason).into(),
            escape(&format!("{}/{name}", event.object_kind)).into(),
        ];
        if self.wide {
            row.extend([Cell::from(escape(&event.source)), escape(&event.request_id).into()]);
        }
        row.push(escape(&event.message).into());
        row
    }
}
