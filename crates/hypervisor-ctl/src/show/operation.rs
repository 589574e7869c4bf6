//! Operations as rows and as a page.

use std::time::SystemTime;

use hv_proto::v1::{self, OperationState};

use super::Page;
use crate::output::Output;
use crate::output::table::{Cell, Table, Tone};
use crate::output::text::{age, escape, moment};

/// Prints operations as rows.
#[derive(Debug)]
pub(crate) struct OperationTable {
    table: Table,
}

impl OperationTable {
    pub(crate) fn new(output: Output) -> Self {
        let titles = vec!["ID", "KIND", "OBJECT", "STATE", "DONE", "AGE", "MESSAGE"];
        Self { table: Table::new(titles, output.colours) }
    }

    /// The rows as lines.
    pub(crate) fn render(&mut self, operations: &[v1::Operation], now: SystemTime) -> String {
        let rows: Vec<Vec<Cell>> = operations.iter().map(|operation| row(operation, now)).collect();
        self.table.render(&rows)
    }
}

fn row(operation: &v1::Operation, now: SystemTime) -> Vec<Cell> {
    vec![
        escape(&operation.id).into(),
        escape(&operation.kind).into(),
        object(operation).into(),
        Cell::toned(state_name(operation.state()), tone(operation.state())),
        done(operation).into(),
        age(operation.created_at.as_ref(), now).into(),
        escape(&operation.message).into(),
    ]
}

fn object(operation: &v1::Operation) -> String {
    format!("{}/{}", escape(&operation.object_kind), escape(&operation.object_name))
}

fn done(operation: &v1::Operation) -> String {
    if operation.total == 0 { String::new() } else { format!("{}/{}", operation.done, operation.total) }
}

/// A state as people see it.
pub(crate) fn state_name(state: OperationState) -> &'static str {
    state.as_str_name().trim_start_matches("OPERATION_STATE_")
}

/// Whether it has ended.
pub(crate) fn is_final(state: OperationState) -> bool {
    matches!(state, OperationState::Succeeded | OperationState::Failed | OperationState::Cancelled)
}

fn tone(state: OperationState) -> Tone {
    match state {
        OperationState::Succeeded => Tone::Good,
        OperationState::Failed => Tone::Bad,
        OperationState::Pending | OperationState::Running | OperationState::Cancelling => Tone::Busy,
        OperationState::Cancelled | OperationState::Unspecified => Tone::Plain,
    }
}

/// Its progress in a line.
pub(crate) fn line(operation: &v1::Operation) -> String {
    let what = format!("{} {}", operation.kind, operation.object_name);
    let done = match done(operation) {
        none if none.is_empty() => String::new(),
        done => format!(" {done}"),
    };
    format!("{what}: {}{done} {}", state_name(operation.state()), operation.message)
}

/// Everything about one operation.
pub(crate) fn describe(operation: &v1::Operation, output: Output) -> Page {
    let mut page = Page::default();
    let state = operation.state();
    page.line(0, "Id", escape(&operation.id));
    page.line(0, "Kind", escape(&operation.kind));
    page.line(0, "Object", object(operation));
    page.line(0, "State", tone(state).paint(state_name(state), output.colours));
    page.some(0, "Phase", escape(&operation.phase));
    page.some(0, "Done", done(operation));
    page.some(0, "Message", escape(&operation.message));
    page.line(0, "Asked for", moment(operation.created_at.as_ref()));
    page.line(0, "Last change", moment(operation.updated_at.as_ref()));
    page.some(0, "Ended", moment(operation.finished_at.as_ref()));
    page.some(0, "Request id", escape(&operation.request_id));
    super::pairs(&mut page, 0, "Parameters", Some(&operation.parameters));
    if !operation.blockers.is_empty() {
        page.heading(0, "Blockers");
        for blocker in &operation.blockers {
            page.line(1, &escape(&blocker.object_name), escape(&blocker.reason));
        }
    }
    page
}
