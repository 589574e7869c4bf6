//! Page tokens: where a list goes on, bound to the filters that it began with.
//!
//! Pages are cut by key, so their cost does not grow with what lies before them, and an object that is there all the
//! time is listed exactly once.

use std::hash::{DefaultHasher, Hash, Hasher};

use hv_types::Invalid;
use hv_types::error::Result as ServiceResult;

/// What a page holds when the caller does not say.
pub const DEFAULT_PAGE_SIZE: usize = 100;
/// The longest name that a list is ordered by, in bytes: an image's, with its type.
const MAX_LAST_BYTES: usize = 600;
/// The most that a page holds.
pub const MAX_PAGE_SIZE: usize = 1000;

/// Where a list is.
#[derive(Clone, Debug)]
pub struct Page {
    /// How many to return.
    pub size: usize,
    /// Only what comes after this id.
    pub after: Option<String>,
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
            return Ok(Self { size, after: None, filters });
        }
        let refused = || {
            Invalid::new(
                "page_token",
                token,
                "must be the next_page_token of a list with the same filters; \
                start again without it",
            )
        };
        let (tag, after) = token.split_once('.').ok_or_else(refused)?;
        if tag != format!("{filters:016x}") {
            return Err(refused().into());
        }
        hv_types::validate::printable("page_token", after, MAX_LAST_BYTES).map_err(|_| refused())?;
        Ok(Self { size, after: Some(after.to_owned()), filters })
    }

    /// The token for what comes after `last`.
    #[must_use]
    pub fn token_after(&self, last: &str) -> String {
        format!("{:016x}.{last}", self.filters)
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
        assert_eq!(Page::new(10, &token, &("vm", 1)).unwrap().after.as_deref(), Some("0190-abc"));
        assert!(Page::new(10, &token, &("vm", 2)).is_err());
    }

    #[test]
    fn foreign_tokens_and_sizes_are_refused_with_the_field_named() {
        for token in ["x", ".", "zzzz.../..", "0000000000000000.a", &"a".repeat(1 << 20)] {
            let refusal = Page::new(0, token, &()).unwrap_err();
            assert!(refusal.message().starts_with("page_token"), "{refusal}");
        }
        for size in [-1, 1001, i32::MAX] {
            assert!(Page::new(size, "", &()).unwrap_err().message().starts_with("page_size"));
        }
    }
}
