//! XML as a tree of values: what is written is escaped here and nowhere else, what is read comes back as the same tree.
//!
//! # Invariants
//! No text ever becomes markup: values are escaped when they are written, and characters that XML 1.0 cannot carry at
//! all (control characters) are dropped.

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// The largest document that is read, in bytes; libvirt's own bound of a text.
const MAX_BYTES: usize = 4 << 20;
/// The deepest nesting that is read.
const MAX_DEPTH: usize = 64;

/// An element with its attributes in order and what is in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Element {
    pub(crate) name: String,
    pub(crate) attributes: Vec<(String, String)>,
    pub(crate) children: Vec<Element>,
    /// The text in it, all pieces together.
    pub(crate) text: String,
}

/// A document that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("this is no XML that can be read: {0}")]
pub(crate) struct Unreadable(String);

impl Element {
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    pub(crate) fn with(mut self, attribute: &str, value: impl ToString) -> Self {
        self.attributes.push((attribute.to_owned(), value.to_string()));
        self
    }

    pub(crate) fn text(mut self, text: impl ToString) -> Self {
        self.text = text.to_string();
        self
    }

    pub(crate) fn child(mut self, child: Self) -> Self {
        self.children.push(child);
        self
    }

    pub(crate) fn children(mut self, children: impl IntoIterator<Item = Self>) -> Self {
        self.children.extend(children);
        self
    }

    pub(crate) fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Self> {
        self.children.iter().filter(move |child| child.name == name)
    }

    /// The first element at a path below this one: `devices/disk`.
    pub(crate) fn at(&self, path: &str) -> Option<&Self> {
        path.split('/').try_fold(self, |element, name| {
            element.children.iter().find(|child| child.name == name)
        })
    }

    pub(crate) fn at_mut(&mut self, path: &str) -> Option<&mut Self> {
        path.split('/').try_fold(self, |element, name| {
            element.children.iter_mut().find(|child| child.name == name)
        })
    }

    /// The text at a path.
    pub(crate) fn text_at(&self, path: &str) -> Option<&str> {
        self.at(path).map(|element| element.text.trim())
    }

    /// Changes every attribute's value and every text below.
    pub(crate) fn rewrite(&mut self, change: &mut dyn FnMut(&mut String)) {
        for (_, value) in &mut self.attributes {
            change(value);
        }
        change(&mut self.text);
        for child in &mut self.children {
            child.rewrite(change);
        }
    }

    /// The document.
    pub(crate) fn to_xml(&self) -> String {
        let mut document = String::new();
        self.write(&mut document);
        document
    }

    fn write(&self, document: &mut String) {
        document.push('<');
        document.push_str(&self.name);
        for (name, value) in &self.attributes {
            document.push(' ');
            document.push_str(name);
            document.push_str("=\"");
            escape(value, document);
            document.push('"');
        }
        if self.children.is_empty() && self.text.is_empty() {
            return document.push_str("/>");
        }
        document.push('>');
        escape(&self.text, document);
        for child in &self.children {
            child.write(document);
        }
        document.push_str("</");
        document.push_str(&self.name);
        document.push('>');
    }

    pub(crate) fn parse(document: &str) -> Result<Self, Unreadable> {
        if document.len() > MAX_BYTES {
            return Err(Unreadable(format!("it has more than {MAX_BYTES} bytes")));
        }
        let told = |error: &dyn std::fmt::Display| Unreadable(error.to_string());
        let mut reader = Reader::from_str(document);
        // The first one stands for the document.
        let mut open = vec![Self::default()];
        loop {
            match reader.read_event().map_err(|e| told(&e))? {
                Event::Start(start) => {
                    if open.len() > MAX_DEPTH {
                        return Err(Unreadable("it is nested too deeply".to_owned()));
                    }
                    open.push(Self::opened(&start)?);
                }
                Event::Empty(start) => {
                    let element = Self::opened(&start)?;
                    open.last_mut().ok_or_else(|| told(&"no document"))?.children.push(element);
                }
                Event::End(_) => {
                    let element = open.pop().ok_or_else(|| told(&"no document"))?;
                    open.last_mut().ok_or_else(|| told(&"too many ends"))?.children.push(element);
                }
                Event::Text(text) => {
                    let text = text.decode().map_err(|e| told(&e))?;
                    open.last_mut().ok_or_else(|| told(&"no document"))?.text.push_str(&text);
                }
                Event::CData(text) => {
                    let text = text.decode().map_err(|e| told(&e))?;
                    open.last_mut().ok_or_else(|| told(&"no document"))?.text.push_str(&text);
                }
                Event::GeneralRef(name) => {
                    let name = name.decode().map_err(|e| told(&e))?;
                    let text = quick_xml::escape::unescape(&format!("&{name};")).map_err(|e| told(&e))?.into_owned();
                    open.last_mut().ok_or_else(|| told(&"no document"))?.text.push_str(&text);
                }
                Event::Eof => break,
                Event::Comment(_) | Event::Decl(_) | Event::PI(_) | Event::DocType(_) => {}
            }
        }
        let mut document = open.pop().filter(|_| open.is_empty()).ok_or_else(|| told(&"it ends too early"))?;
        document.children.pop().ok_or_else(|| told(&"it has no element"))
    }

    fn opened(start: &BytesStart<'_>) -> Result<Self, Unreadable> {
        let told = |error: &dyn std::fmt::Display| Unreadable(error.to_string());
        let name = String::from_utf8_lossy(start.name().as_ref()).into_owned();
        let mut element = Self { name, ..Self::default() };
        for attribute in start.attributes() {
            let attribute = attribute.map_err(|e| told(&e))?;
            let key = String::from_utf8_lossy(attribute.key.as_ref()).into_owned();
            element.attributes.push((key, attribute.unescape_value().map_err(|e| told(&e))?.into_owned()));
        }
        Ok(element)
    }
}

/// What text may contain and how (XML 1.0, 2.2 and 2.4). Line ends and tabs would be made blanks in attributes.
fn escape(text: &str, document: &mut String) {
    for character in text.chars() {
        match character {
            '&' => document.push_str("&amp;"),
            '<' => document.push_str("&lt;"),
            '>' => document.push_str("&gt;"),
            '"' => document.push_str("&quot;"),
            '\'' => document.push_str("&apos;"),
            '\t' => document.push_str("&#9;"),
            '\n' => document.push_str("&#10;"),
            '\r' => document.push_str("&#13;"),
            '\u{0}'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => {}
            other => document.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_whatever_it_contains() {
        let nasty = "</a><b x='1'>&amp; \" ' ]]> <!-- ü\n\t\r end";
        let tree = Element::new("a")
            .with("first", nasty)
            .with("n", 3)
            .child(Element::new("b").text(nasty))
            .child(Element::new("c").child(Element::new("d").with("e", "")));
        let read = Element::parse(&tree.to_xml()).unwrap();
        assert_eq!(read, tree);
        assert_eq!(read.text_at("b"), Some(nasty));
        assert_eq!(read.at("c/d").unwrap().attribute("e"), Some(""));
    }

    #[test]
    fn control_characters_do_not_come_through() {
        let document = Element::new("a").text("x\u{0}y\u{1b}z\u{ffff}").to_xml();
        assert_eq!(document, "<a>xyz</a>");
    }

    #[test]
    fn broken_documents_are_refused() {
        for broken in ["", "<a>", "<a></b>", "text", "<a x=1/>", &"<a>".repeat(100), "<a>&nothing;</a>"] {
            assert!(Element::parse(broken).is_err(), "{broken}");
        }
    }
}
