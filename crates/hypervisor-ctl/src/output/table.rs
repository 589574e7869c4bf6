//! Tables without borders. Columns keep their width from one batch of rows to the next, so that a watch stays aligned.

use std::fmt::Write as _;

/// Spaces between columns.
const GAP: usize = 3;

/// How a cell's text is shown on a terminal that has colours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Tone {
    /// As the rest.
    #[default]
    Plain,
    /// All is well.
    Good,
    /// Not yet, or not now.
    Busy,
    /// Somebody should look at it.
    Bad,
}

impl Tone {
    /// The colour's number in "select graphic rendition" (ECMA-48, section 8.3.117).
    fn colour(self) -> Option<u8> {
        match self {
            Self::Plain => None,
            Self::Good => Some(32),
            Self::Busy => Some(33),
            Self::Bad => Some(31),
        }
    }

    /// The text in this tone.
    pub(crate) fn paint(self, text: &str, colours: bool) -> String {
        match self.colour().filter(|_| colours) {
            Some(colour) => format!("\u{1b}[{colour}m{text}\u{1b}[0m"),
            None => text.to_owned(),
        }
    }
}

/// One cell. The text is escaped already where others chose it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    /// A cell with a tone.
    pub(crate) fn toned(text: impl Into<String>, tone: Tone) -> Self {
        Self { text: text.into(), tone }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self { text: text.into(), tone: Tone::Plain }
    }
}

/// The columns of a table, and how wide they have become.
#[derive(Debug)]
pub(crate) struct Table {
    titles: Vec<&'static str>,
    widths: Vec<usize>,
    titled: bool,
    colours: bool,
}

impl Table {
    /// A table with these titles.
    pub(crate) fn new(titles: Vec<&'static str>, colours: bool) -> Self {
        let widths = titles.iter().map(|title| title.chars().count()).collect();
        Self { titles, widths, titled: false, colours }
    }

    /// Makes columns so wide from the beginning, for rows that are not known yet.
    pub(crate) fn reserve(&mut self, columns: &[(&str, usize)]) {
        for (title, wanted) in columns {
            let found = self.titles.iter().position(|known| known == title);
            if let Some(width) = found.and_then(|index| self.widths.get_mut(index)) {
                *width = (*width).max(*wanted);
            }
        }
    }

    /// The rows as lines, under the titles if they were not yet printed. An empty cell shows as `-`.
    pub(crate) fn render(&mut self, rows: &[Vec<Cell>]) -> String {
        for row in rows {
            for (width, cell) in self.widths.iter_mut().zip(row) {
                *width = (*width).max(cell.text.chars().count());
            }
        }
        let mut text = String::new();
        if !std::mem::replace(&mut self.titled, true) {
            let titles: Vec<Cell> = self.titles.iter().map(|title| Cell::from(*title)).collect();
            self.line(&titles, &mut text);
        }
        for row in rows {
            self.line(row, &mut text);
        }
        text
    }

    fn line(&self, row: &[Cell], text: &mut String) {
        for (index, (cell, width)) in row.iter().zip(&self.widths).enumerate() {
            let shown = if cell.text.is_empty() { "-" } else { &cell.text };
            let last = index + 1 == row.len();
            let padding = if last { 0 } else { width + GAP - shown.chars().count().min(*width) };
            // Writing to a string cannot fail.
            let _ = write!(text, "{}{:padding$}", cell.tone.paint(shown, self.colours), "");
        }
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_keep_their_width_in_a_watch() {
        let mut table = Table::new(vec!["NAME", "STATE", "AGE"], false);
        let first = table.render(&[
            vec!["a-long-name".into(), Cell::toned("RUNNING", Tone::Good), "1m".into()],
            vec!["b".into(), "".into(), "2m".into()],
        ]);
        assert_eq!(
            first,
            "NAME          STATE     AGE\n\
             a-long-name   RUNNING   1m\n\
             b             -         2m\n"
        );
        assert_eq!(
            table.render(&[vec!["c".into(), "X".into(), "3m".into()]]),
            "c             X         3m\n"
        );
    }

    #[test]
    fn colours_do_not_disturb_the_alignment() {
        let mut table = Table::new(vec!["STATE", "AGE"], true);
        let text = table.render(&[vec![Cell::toned("FAILED", Tone::Bad), "1m".into()]]);
        assert_eq!(text, "STATE    AGE\n\u{1b}[31mFAILED\u{1b}[0m   1m\n");
    }
}
