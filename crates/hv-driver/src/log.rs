//! Cutting a log at line ends, as every driver that keeps one has to.

/// The last `lines` lines of `text`. A last line without a line feed counts.
#[must_use]
pub fn last_lines(text: &[u8], lines: u64) -> &[u8] {
    if lines == 0 {
        return &[];
    }
    let mut left = lines;
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    for (index, byte) in body.iter().enumerate().rev() {
        if *byte == b'\n' {
            left = left.saturating_sub(1);
            if left == 0 {
                return &text[index + 1..];
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::last_lines;

    #[test]
    fn lines_are_counted_from_the_end() {
        let cases: [(&[u8], u64, &[u8]); 7] = [
            (b"a\nb\nc\n", 2, b"b\nc\n"),
            (b"a\nb\nc", 2, b"b\nc"),
            (b"a\nb\n", 9, b"a\nb\n"),
            (b"a\n\n", 1, b"\n"),
            (b"a\nb\n", 0, b""),
            (b"", 3, b""),
            (b"\n", 1, b"\n"),
        ];
        for (text, lines, expected) in cases {
            assert_eq!(last_lines(text, lines), expected, "{text:?} {lines}");
        }
    }
}
