//! An error with its causes on one line.

use std::error::Error;

/// The causes that are followed: a chain that leads back to itself must end.
const MAX_CAUSES: usize = 32;

/// Joins what the error and each of its causes display with `: `. A cause that the text so far already ends with,
/// because its owner repeats it, is not said again.
pub fn error_chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    for cause in causes.take(MAX_CAUSES) {
        let cause = cause.to_string();
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Link {
        text: &'static str,
        source: Option<Box<Link>>,
    }

    fn chain(texts: &[&'static str]) -> Link {
        let (text, rest) = texts.split_first().expect("a chain has a first link");
        Link { text, source: (!rest.is_empty()).then(|| Box::new(chain(rest))) }
    }

    #[test]
    fn causes_are_joined_in_order() {
        assert_eq!(
            error_chain(&chain(&["cannot start", "no disk", "not found"])),
            "cannot start: no disk: not found"
        );
        assert_eq!(error_chain(&chain(&["alone"])), "alone");
    }

    #[test]
    fn a_cause_that_its_owner_repeats_is_said_once() {
        assert_eq!(error_chain(&chain(&["a: b: c", "b: c", "c"])), "a: b: c");
        assert_eq!(error_chain(&chain(&["same", "same", "other"])), "same: other");
        assert_eq!(error_chain(&chain(&["no", "piano"])), "no: piano");
    }

    #[test]
    fn an_endless_chain_ends() {
        #[derive(Debug)]
        struct Loop;
        impl std::fmt::Display for Loop {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("loop")
            }
        }
        impl Error for Loop {
            fn source(&self) -> Option<&(dyn Error + 'static)> {
                Some(&Loop)
            }
        }
        assert_eq!(error_chain(&Loop), "loop");
    }
}
