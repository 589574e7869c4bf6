//! Declarative files: read, compared with what there is, carried out.
