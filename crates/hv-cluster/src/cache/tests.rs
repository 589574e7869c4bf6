//! Claims about the cache.
