//! Page tokens: where a list goes on, bound to the filters that it began with.
//!
//! # Guarantees
//! - Pages are cut by key, so their cost does not grow with what lies before them.
//! - An object that is there from the first page to the last, and matches all the time, is listed exactly once.
//! - A page shows each object as it is when the page is made, never older than the first page: there is no history of
//!   objects. What comes or goes between two pages may be listed or not.
//! - Every page of a list of instances carries the revision of the first. Whoever lists all pages and then watches from the
//!   revision after that one has everything: a change that a page did not show yet is in the watch, and so may be one that
//!   it did.

use std::hash::{DefaultHasher, Hash, Hasher};

use hv_types::error::Result as ServiceResult;
use hv_types::{Invalid, Revision};

/// What a page holds when the caller does not say.
pub const DEFAULT_PAGE_SIZE: usize = 100;
/// The longest name that a list is ordered by, in bytes: an image's, with its type.
const MAX_LAST_BYTES: usize = 600;
/// The most that a page holds.
pub const MAX_PAGE_SIZE: usize = 1000;

/// What the first page of a list said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct First {
    /// Its revision.
    pub revision: Revision,
    /// How many matched then.
    pub total: usize,
}

/// Where a list is.
#[derive(Clone, Debug)]
pub struct Page {
    /// How many to return.
    pub size: usize,
    /// Only what comes after this id.
    pub after: Option<String>,
    /// What the list's first page said; `None` on the first, and in lists that do not keep it.
    pub first: Option<First>,
    filters: u64,
}

impl Page {
    /// The page that a request asks for; `filters` is everything else that the request says.
    ///
    /// # Errors
    /// The size is negative or too large, or the token is not one of ours for the same filters.
    pub fn new(size: i32, token: &str, filters: &impl Hash) -> ServiceResult<Self> {
        let filters = digest(filters);
        let size = match usize::try_from(size) {
            Ok(0) => DEFAULT_PAGE_SIZE,
            Ok(size) if size <= MAX_PAGE_SIZE => size,
            _ => {
                let expected = format!("must be between 0 and {MAX_PAGE_SIZE}");
                return Err(Invalid::new("page_size", size, expected).into());
            }
        };
        if token.is_empty() {
            return Ok(Self { size, after: None, first: None, filters });
        }
        let refused = || {
            Invalid::new(
                "page_token",
                token,
                "must be the next_page_token of a list with the same filters; \
                start again without it",
            )
        };
        let mut parts = token.splitn(4, '.');
        let mut part = || parts.next().ok_or_else(refused);
        let (tag, revision, total, after) = (part()?, part()?, part()?, part()?);
        if tag != format!("{filters:016x}") {
            return Err(refused().into());
        }
        let revision = u64::from_str_radix(revision, 16).map_err(|_| refused())?;
        let total = usize::from_str_radix(total, 16).map_err(|_| refused())?;
        let first = (revision != 0).then_some(First { revision: Revision(revision), total });
        hv_types::validate::printable("page_token", after, MAX_LAST_BYTES).map_err(|_| refused())?;
        Ok(Self { size, after: Some(after.to_owned()), first, filters })
    }

    /// The token for what comes after `last`.
    #[must_use]
    pub fn token_after(&self, last: &str) -> String {
        self.token_at(last, First { revision: Revision(0), total: 0 })
    }

    /// The token for what comes after `last`, in a list whose first page said `first`.
    #[must_use]
    pub fn token_at(&self, last: &str, first: First) -> String {
        format!("{:016x}.{:x}.{:x}.{last}", self.filters, first.revision.0, first.total)
    }
}

/// Not for security: a token from another list must not silently skip objects, that is all.
fn digest(filters: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    filters.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_goes_on_only_with_its_own_filters() {
        let page = Page::new(10, "", &("vm", 1)).unwrap();
        let token = page.token_after("0190-abc");
        let next = Page::new(10, &token, &("vm", 1)).unwrap();
        assert_eq!((next.after.as_deref(), next.first), (Some("0190-abc"), None));
        let first = First { revision: Revision(4711), total: 12 };
        let next = Page::new(10, &page.token_at("x.y", first), &("vm", 1)).unwrap();
        assert_eq!((next.after.as_deref(), next.first), (Some("x.y"), Some(first)));
        assert!(Page::new(10, &token, &("vm", 2)).is_err());
    }

    #[test]
    fn foreign_tokens_and_sizes_are_refused_with_the_field_named() {
        let mine = Page::new(0, "", &()).unwrap().token_after("a");
        let broken = [mine.replacen(".0.", ".x.", 1), mine.replacen(".0.0.", ".0.", 1)];
        for token in
            ["x", ".", &broken[0], &broken[1], "zzzz.../..", "0000000000000000.a", &"a".repeat(1 << 20)]
        {
            let refusal = Page::new(0, token, &()).unwrap_err();
            assert!(refusal.message().starts_with("page_token"), "{refusal}");
        }
        for size in [-1, 1001, i32::MAX] {
            assert!(Page::new(size, "", &()).unwrap_err().message().starts_with("page_size"));
        }
    }
}
