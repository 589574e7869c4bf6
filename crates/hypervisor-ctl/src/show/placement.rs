//! Why something is placed where it is, or nowhere.

use hv_proto::v1;

use super::Page;
use crate::output::Output;
use crate::output::table::{Cell, Table};
use crate::output::text::escape;

/// An explanation as a page.
pub(crate) fn explanation(explanation: &v1::PlacementExplanation, output: Output) -> Page {
    let mut page = Page::default();
    page.line(0, "Summary", escape(&explanation.summary));
    if !explanation.node_id.is_empty() {
        page.line(0, "Node", format!("{} ({})", escape(&explanation.hostname), escape(&explanation.node_id)));
    }
    let (fitting, total) = (explanation.fitting_nodes, explanation.total_nodes);
    page.line(0, "Nodes", format!("{fitting} of {total} could take it"));
    if !explanation.rejections.is_empty() {
        let mut table = Table::new(vec!["RULE", "NODES", "WHICH ARE", "AS"], output.colours);
        let row = |rejection: &v1::RuleRejection| -> Vec<Cell> {
            vec![
                escape(&rejection.rule).into(),
                rejection.nodes.to_string().into(),
                escape(&rejection.message).into(),
                escape(&rejection.examples.join(", ")).into(),
            ]
        };
        page.heading(0, "Rejected");
        page.block(1, &table.render(&explanation.rejections.iter().map(row).collect::<Vec<_>>()));
    }
    if !explanation.best.is_empty() {
        let mut table = Table::new(vec!["NODE", "SCORE", "FOR"], output.colours);
        let row = |node: &v1::ScoredNode| -> Vec<Cell> {
            vec![
                escape(&node.hostname).into(),
                format!("{:.3}", node.score).into(),
                escape(&node.message).into(),
            ]
        };
        page.heading(0, "Best");
        page.block(1, &table.render(&explanation.best.iter().map(row).collect::<Vec<_>>()));
    }
    if !explanation.remedies.is_empty() {
        page.heading(0, "What would help");
        for remedy in &explanation.remedies {
            page.block(1, &escape(remedy));
        }
    }
    page
}

/// Where instances would go.
pub(crate) fn preview(preview: &v1::PreviewPlacementResponse, output: Output) -> String {
    let mut text = String::new();
    if !preview.nodes.is_empty() {
        let mut table = Table::new(vec!["NODE", "INSTANCES"], output.colours);
        let row = |node: &v1::PreviewedNode| -> Vec<Cell> {
            vec![escape(&node.hostname).into(), node.count.to_string().into()]
        };
        text.push_str(&table.render(&preview.nodes.iter().map(row).collect::<Vec<_>>()));
    }
    if preview.unplaced > 0 {
        text.push_str(&format!("{} would wait for a node:\n", preview.unplaced));
    }
    if let Some(why) = &preview.explanation {
        text.push_str(&explanation(why, output).text());
    }
    text
}
