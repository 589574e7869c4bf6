//! Instances, nodes, images and events as rows and pages for people.

pub(crate) mod event;
pub(crate) mod instance;
pub(crate) mod node;
pub(crate) mod operation;
pub(crate) mod placement;
pub(crate) mod store;

use crate::output::text::{escape, size};

/// A page of `name: value` lines, indented by level.
#[derive(Debug, Default)]
pub(crate) struct Page {
    lines: Vec<(usize, String, String)>,
}

impl Page {
    /// A line; an empty value shows as `-`.
    pub(crate) fn line(&mut self, level: usize, name: &str, value: impl Into<String>) {
        self.lines.push((level, name.to_owned(), value.into()));
    }

    /// A line, unless the value is empty.
    pub(crate) fn some(&mut self, level: usize, name: &str, value: impl Into<String>) {
        let value = value.into();
        if !value.is_empty() {
            self.line(level, name, value);
        }
    }

    /// A heading.
    pub(crate) fn heading(&mut self, level: usize, name: &str) {
        self.line(level, name, "\n");
    }

    /// A table under a heading.
    pub(crate) fn block(&mut self, level: usize, text: &str) {
        for line in text.lines() {
            self.line(level, "", line);
        }
    }

    /// The page as text.
    pub(crate) fn text(&self) -> String {
        const INDENT: usize = 2;
        let title = |level: usize, name: &str| level * INDENT + name.chars().count() + 1;
        let valued = self.lines.iter().filter(|(_, name, value)| !name.is_empty() && value != "\n");
        let width = valued.map(|(level, name, _)| title(*level, name)).max().unwrap_or_default() + 2;
        let mut text = String::new();
        for (level, name, value) in &self.lines {
            let indent = level * INDENT;
            let line = match (name.as_str(), value.as_str()) {
                ("", value) => format!("{:indent$}{value}", ""),
                (name, "\n") => format!("{:indent$}{name}:", ""),
                (name, value) => {
                    let gap = width - title(*level, name);
                    let value = if value.is_empty() { "-" } else { value };
                    format!("{:indent$}{name}:{:gap$}{value}", "", "")
                }
            };
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Cores, memory and disk in a few words.
pub(crate) fn resources(amount: Option<&hv_proto::v1::Resources>) -> String {
    let Some(amount) = amount else { return String::new() };
    let mut text = format!("{} cores, {} memory", amount.cpu_cores, size(amount.memory_bytes));
    if amount.disk_bytes > 0 {
        text.push_str(&format!(", {} disk", size(amount.disk_bytes)));
    }
    if amount.gpu_count > 0 {
        text.push_str(&format!(", {} accelerators", amount.gpu_count));
    }
    text
}

/// Labels or annotations under a heading, by key.
pub(crate) fn pairs(
    page: &mut Page,
    level: usize,
    name: &str,
    pairs: Option<&std::collections::HashMap<String, String>>,
) {
    let mut sorted: Vec<_> = pairs.into_iter().flatten().collect();
    if sorted.is_empty() {
        return;
    }
    sorted.sort();
    page.heading(level, name);
    for (key, value) in sorted {
        page.line(level + 1, &escape(key), escape(value));
    }
}
