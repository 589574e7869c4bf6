//! Claims about the server as its clients see it.

mod calls;
mod config;
mod paging;
mod ports;
mod refusals;
mod watches;
mod world;
