//! Declarative files: read ([`document`]), then compared with what there is ([`plan`]). Carrying a plan out is
//! `command::apply`.

pub(crate) mod document;
pub(crate) mod plan;
mod source;

pub(crate) use source::read;
