//! Claims about the server as its clients see it.

mod calls;
mod config;
mod limits;
mod paging;
mod ports;
mod refusals;
mod store;
mod watches;
mod world;
