//! The store as a page.

use hv_proto::v1;

use super::Page;
use crate::output::Output;
use crate::output::table::{Cell, Table, Tone};
use crate::output::text::{escape, size};

/// How the store is doing.
pub(crate) fn status(status: &v1::StoreStatus, output: Output) -> Page {
    let mut page = Page::default();
    let (state, tone) = match (status.is_full, status.is_frozen) {
        (true, _) => ("full: changes that take room are refused", Tone::Bad),
        (false, true) => ("frozen: changes of users are refused", Tone::Busy),
        (false, false) => ("takes changes", Tone::Good),
    };
    page.line(0, "Backend", escape(&status.backend));
    page.line(0, "State", tone.paint(state, output.colours));
    page.line(0, "Revision", status.revision.to_string());
    page.line(0, "History from", status.compacted_revision.to_string());
    let of =
        if status.quota_bytes == 0 { String::new() } else { format!(" of {}", bytes(status.quota_bytes)) };
    page.line(0, "Size", format!("{}{of}, {} in use", bytes(status.size_bytes), bytes(status.used_bytes)));
    page.line(0, "Schema", status.schema.to_string());
    let mut records: Vec<_> = status.records.iter().collect();
    records.sort();
    if !records.is_empty() {
        page.heading(0, "Records");
    }
    for (kind, count) in records {
        page.line(1, &escape(kind), count.to_string());
    }
    if !status.members.is_empty() {
        let mut table = Table::new(
            vec!["MEMBER", "ENDPOINT", "VERSION", "ROLE", "SIZE", "IN USE", "ERROR"],
            output.colours,
        );
        let row = |member: &v1::StoreMember| -> Vec<Cell> {
            vec![
                escape(&member.id).into(),
                escape(&member.endpoint).into(),
                escape(&member.version).into(),
                if member.is_leader { "leader" } else { "follower" }.into(),
                bytes(member.size_bytes).into(),
                bytes(member.used_bytes).into(),
                Cell::toned(escape(&member.error), Tone::Bad),
            ]
        };
        page.heading(0, "Members");
        page.block(1, &table.render(&status.members.iter().map(row).collect::<Vec<_>>()));
    }
    for warning in &status.warnings {
        page.line(0, "Warning", escape(warning));
    }
    page
}

fn bytes(count: u64) -> String {
    size(i64::try_from(count).unwrap_or(i64::MAX))
}
