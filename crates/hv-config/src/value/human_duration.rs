//! A span of time as people write it: `10s`, `500ms`, `2m`, `1h30m`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::{ValueError, text_serde};

const EXPECTED: &str =
    "a duration with its unit (ns, us, ms, s, m, h, d), as 10s, 500ms, 2m or 1h30m (at most 3650d)";

/// Largest first; the order in which a compound duration must be written.
const UNITS: [(&str, u128); 7] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// A span of time, at most [`HumanDuration::MAX`]. A number without a unit is refused: nobody knows what it means.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HumanDuration(Duration);

impl HumanDuration {
    /// Ten years. The bound keeps sums with an `Instant` from overflowing.
    pub const MAX: Self = Self(Duration::from_secs(3650 * 24 * 60 * 60));

    /// A duration, cut off at [`HumanDuration::MAX`].
    pub const fn new(duration: Duration) -> Self {
        if duration.as_nanos() > Self::MAX.0.as_nanos() { Self::MAX } else { Self(duration) }
    }

    /// A number of seconds, cut off at [`HumanDuration::MAX`].
    pub const fn from_secs(seconds: u64) -> Self {
        Self::new(Duration::from_secs(seconds))
    }

    /// A number of milliseconds, cut off at [`HumanDuration::MAX`].
    pub const fn from_millis(milliseconds: u64) -> Self {
        Self::new(Duration::from_millis(milliseconds))
    }

    /// As the standard library has it.
    pub const fn get(self) -> Duration {
        self.0
    }
}

impl From<HumanDuration> for Duration {
    fn from(duration: HumanDuration) -> Self {
        duration.0
    }
}

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_nanos();
        if rest == 0 {
            return f.write_str("0s");
        }
        // Days are read but not written: `24h` shows as it is usually typed.
        for (unit, unit_ns) in &UNITS[1..] {
            if rest >= *unit_ns {
                write!(f, "{}{unit}", rest / unit_ns)?;
                rest %= unit_ns;
            }
        }
        Ok(())
    }
}

impl FromStr for HumanDuration {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        parse(text.trim()).ok_or_else(|| ValueError::new(text, EXPECTED))
    }
}

fn parse(text: &str) -> Option<HumanDuration> {
    let mut rest = text;
    let mut next_unit = 0;
    let mut total_ns: u128 = 0;
    while !rest.is_empty() {
        let digits_end = rest.find(|c: char| !c.is_ascii_digit())?;
        let (digits, tail) = rest.split_at(digits_end);
        let unit_end = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let (index, (_, unit_ns)) =
            UNITS.iter().enumerate().skip(next_unit).find(|(_, (name, _))| *name == unit)?;
        let number = u128::from(digits.parse::<u64>().ok()?);
        total_ns = total_ns.checked_add(number.checked_mul(*unit_ns)?)?;
        next_unit = index + 1;
        rest = tail;
    }
    let total_ns = u64::try_from(total_ns).ok()?;
    let duration = Duration::from_nanos(total_ns);
    (!text.is_empty() && duration <= HumanDuration::MAX.0).then_some(HumanDuration(duration))
}

text_serde!(HumanDuration, EXPECTED);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_are_read_with_their_unit() {
        for (text, milliseconds) in [
            ("0s", 0),
            ("500ms", 500),
            ("10s", 10_000),
            ("2m", 120_000),
            ("1h30m", 5_400_000),
            ("1d", 86_400_000),
            (" 7s ", 7_000),
            ("3650d", 315_360_000_000),
        ] {
            assert_eq!(text.parse(), Ok(HumanDuration::from_millis(milliseconds)), "{text}");
        }
    }

    #[test]
    fn durations_without_unit_out_of_order_or_too_long_are_refused_with_an_example() {
        for text in
            ["", "10", "s", "-1s", "1.5s", "10 parsecs", "1m1h", "1s1s", "3651d", "99999999999999999999s"]
        {
            let message = text.parse::<HumanDuration>().map_err(|error| error.to_string()).expect_err(text);
            assert!(message.contains("500ms") && message.contains(&format!("{text:?}")), "{message}");
        }
    }

    #[test]
    fn a_duration_shows_as_it_is_usually_typed() {
        for text in ["0s", "10s", "500ms", "2m", "1h30m", "24h", "1m30s", "1s1ns"] {
            assert_eq!(
                text.parse::<HumanDuration>().map(|duration| duration.to_string()),
                Ok(text.to_owned())
            );
        }
    }

    proptest! {
        #[test]
        fn a_shown_duration_reads_back(nanoseconds in 0..=HumanDuration::MAX.0.as_nanos() as u64) {
            let duration = HumanDuration::new(Duration::from_nanos(nanoseconds));
            prop_assert_eq!(duration.to_string().parse(), Ok(duration));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[0-9a-z .µ-]*") {
            if let Ok(duration) = text.parse::<HumanDuration>() {
                prop_assert!(duration <= HumanDuration::MAX);
            }
        }
    }
}
