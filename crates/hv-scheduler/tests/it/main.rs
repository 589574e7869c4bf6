//! Tests of the scheduler through its public interface.

mod claims;
mod devices;
mod explain;
mod model;
mod others;
mod preemption;
mod reference;
mod world;
