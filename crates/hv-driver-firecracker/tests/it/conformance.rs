//! The driver against the conformance suite: on the real Firecracker, and on the contract double.

mod real {
    //! On the real Firecracker in its jail, with a bare-metal guest.

    use crate::subject::real;

    hv_driver::driver_conformance!(real);
}

mod doubled {
    //! On the contract double, which needs neither KVM nor Firecracker.

    use crate::subject::doubled;

    hv_driver::driver_conformance!(doubled);
}
