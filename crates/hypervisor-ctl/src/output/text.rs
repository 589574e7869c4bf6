//! Words for people: ages, sizes, times, labels; and escaping what others chose.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use hv_proto::convert::from_timestamp;
use pbjson_types::Timestamp;

/// Characters of a generated id (a UUID of version 7) that hold its time to the millisecond; fewer would mean several
/// instances more often than not.
const SHORT_ID_CHARS: usize = 13;
/// Longest id that is shown whole.
const WHOLE_ID_CHARS: usize = 20;

/// Text without control characters: a name or a message must not be able to steer the terminal.
pub(crate) fn escape(text: &str) -> String {
    let steers = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if steers(c) { escaped.extend(c.escape_default()) } else { escaped.push(c) }
    }
    escaped
}

/// The same, with line feeds kept.
pub(crate) fn escape_lines(text: &str) -> String {
    text.split('\n').map(escape).collect::<Vec<_>>().join("\n")
}

/// Whether a moment is more than the wire's zero, which stands for one that nobody has set.
fn is_set(stamp: &Timestamp) -> bool {
    stamp.seconds > 0
}

/// How long ago, in one or two units.
pub(crate) fn age(then: Option<&Timestamp>, now: SystemTime) -> String {
    let Some(then) = then.filter(|then| is_set(then)) else { return String::new() };
    // A server whose clock is ahead: nothing is older than nothing.
    span(now.duration_since(from_timestamp(then)).unwrap_or_default())
}

/// A span of time in one or two units: `12s`, `3m20s`, `5h`, `4d6h`.
pub(crate) fn span(span: Duration) -> String {
    const MINUTE: u64 = 60;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    let two = |value: u64, big: u64, big_name: &str, small: u64, small_name: &str| match value % big / small {
        0 => format!("{}{big_name}", value / big),
        rest => format!("{}{big_name}{rest}{small_name}", value / big),
    };
    match span.as_secs() {
        seconds @ 0..120 => format!("{seconds}s"),
        seconds if seconds < 10 * MINUTE => two(seconds, MINUTE, "m", 1, "s"),
        seconds if seconds < 3 * HOUR => format!("{}m", seconds / MINUTE),
        seconds if seconds < 8 * HOUR => two(seconds, HOUR, "h", MINUTE, "m"),
        seconds if seconds < 2 * DAY => format!("{}h", seconds / HOUR),
        seconds if seconds < 8 * DAY => two(seconds, DAY, "d", HOUR, "h"),
        seconds => format!("{}d", seconds / DAY),
    }
}

/// A number of bytes in the unit that needs at most four digits.
pub(crate) fn size(bytes: i64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes.unsigned_abs() < 1024 {
        return format!("{bytes}B");
    }
    let mut value = bytes as f64;
    let mut unit = "B";
    for name in UNITS {
        if value.abs() < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = name;
    }
    let shown = format!("{value:.1}");
    format!("{}{unit}", shown.strip_suffix(".0").unwrap_or(&shown))
}

/// A moment, in UTC (RFC 3339).
pub(crate) fn moment(stamp: Option<&Timestamp>) -> String {
    let text = stamp.filter(|stamp| is_set(stamp)).and_then(|stamp| serde_json::to_value(stamp).ok());
    let text = text.as_ref().and_then(serde_json::Value::as_str).unwrap_or_default();
    let (whole, zone) =
        (text.split(['.', '+', 'Z']).next().unwrap_or_default(), if text.is_empty() { "" } else { "Z" });
    format!("{whole}{zone}")
}

/// Labels in the order of their keys: `a=b,c=d`.
pub(crate) fn labels(labels: &HashMap<String, String>) -> String {
    let mut pairs: Vec<String> =
        labels.iter().map(|(key, value)| escape(&format!("{key}={value}"))).collect();
    pairs.sort();
    pairs.join(",")
}

/// As much of an id as tells it from the others, at least what tells it from most.
pub(crate) fn short_ids<'a>(ids: impl IntoIterator<Item = &'a str>) -> usize {
    let mut ids: Vec<&str> = ids.into_iter().filter(|id| id.chars().count() > WHOLE_ID_CHARS).collect();
    ids.sort_unstable();
    ids.dedup();
    let shared = |(a, b): (&str, &str)| a.chars().zip(b.chars()).take_while(|(a, b)| a == b).count();
    let most = ids.windows(2).map(|pair| shared((pair[0], pair[1]))).max().unwrap_or_default();
    (most + 1).max(SHORT_ID_CHARS)
}

/// The id, cut to what [`short_ids`] found; one that people chose stays whole.
pub(crate) fn short_id(id: &str, chars: usize) -> String {
    if id.chars().count() <= WHOLE_ID_CHARS {
        escape(id)
    } else {
        escape(&id.chars().take(chars).collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_steers_a_terminal_gets_through() {
        assert_eq!(escape("a\u{1b}[31mb\r\n\u{9b}c\u{202e}d"), "a\\u{1b}[31mb\\r\\n\\u{9b}c\\u{202e}d");
        assert_eq!(escape("ü — 名前"), "ü — 名前");
        assert_eq!(escape_lines("a\nb\u{7}"), "a\nb\\u{7}");
    }

    #[test]
    fn ages_have_one_or_two_units() {
        for (seconds, expected) in [
            (0, "0s"),
            (119, "119s"),
            (200, "3m20s"),
            (3000, "50m"),
            (4 * 3600 + 120, "4h2m"),
            (30 * 3600, "30h"),
            (4 * 86400 + 6 * 3600, "4d6h"),
            (100 * 86400, "100d"),
        ] {
            assert_eq!(span(Duration::from_secs(seconds)), expected);
        }
        let now = SystemTime::UNIX_EPOCH;
        assert_eq!(
            age(Some(&Timestamp { seconds: 5, nanos: 0 }), now),
            "0s",
            "the server's clock may be ahead"
        );
        assert_eq!(age(None, now), "");
        assert_eq!(age(Some(&Timestamp { seconds: 0, nanos: 0 }), now), "", "nobody has set it");
    }

    #[test]
    fn sizes_have_a_unit_and_few_digits() {
        for (bytes, expected) in [
            (0, "0B"),
            (1023, "1023B"),
            (1024, "1KiB"),
            (1536, "1.5KiB"),
            (512 << 20, "512MiB"),
            (1 << 30, "1GiB"),
            (i64::MAX, "8EiB"),
            (-2048, "-2KiB"),
        ] {
            assert_eq!(size(bytes), expected);
        }
    }

    #[test]
    fn a_moment_is_printed_in_utc_without_fractions() {
        assert_eq!(moment(Some(&Timestamp { seconds: 1_700_000_000, nanos: 5 })), "2023-11-14T22:13:20Z");
        assert_eq!(moment(None), "");
    }

    #[test]
    fn ids_are_shortened_only_as_far_as_they_differ() {
        let ids = ["0190a1b2-c3d4-7000-8000-000000000001", "0190a1b2-c3d4-7100-8000-000000000002"];
        assert_eq!(short_ids(ids), 16);
        assert_eq!(short_id(ids[0], 16), "0190a1b2-c3d4-70");
        assert_eq!(short_ids([ids[0]]), SHORT_ID_CHARS);
        assert_eq!(short_id("node-1", 3), "node-1");
    }
}
