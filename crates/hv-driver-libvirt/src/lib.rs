//! Virtual machines through libvirtd, over its own protocol and without its C library.
//!
//! Without the cargo feature `libvirt`, and where libvirt does not run, the driver is there all the same: it says so,
//! and refuses everything.

mod options;

macro_rules! of_the_driver {
    ($($module:ident)*) => {
        $(#[cfg(all(target_os = "linux", feature = "libvirt"))] mod $module;)*
    };
}

of_the_driver! {
    agent console create daemon domain driver emulator files incoming inner look link machine migrate node
    problem protocol rescue rpc snapshot stats update watch xdr xml
}

#[cfg(not(all(target_os = "linux", feature = "libvirt")))]
#[path = "elsewhere.rs"]
mod driver;

pub use driver::LibvirtDriver;
pub use options::{Accel, LibvirtOptions};

/// The driver's name.
pub const NAME: &str = "libvirt";
