//! Claims about the wire contract.

mod reference;
