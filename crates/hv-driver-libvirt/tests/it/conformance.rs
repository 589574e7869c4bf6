//! The driver against the conformance suite, on a real libvirtd.

use crate::subject::setup;

hv_driver::driver_conformance!(setup);

/// The claims about moving once more, with disks in a pool that both nodes reach.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lies_in_a_shared_pool_moves_and_is_never_removed_by_the_other_node() {
    let Some(mut subject) = setup().await else { return };
    subject.use_pool();
    hv_driver::conformance::migration::what_moves_with_shared_disks_goes_on_at_the_target(&subject).await;
    hv_driver::conformance::migration::an_abort_after_the_hand_over_brings_it_back(&subject).await;
    hv_driver::conformance::migration::what_waits_does_not_run(&subject).await;
    subject.forget_pool();
}
