//! What a move's target has to have before it is begun, and before it is committed.

use hv_types::OperationState;

use super::{Set, begin, ended, operation, options};
use crate::movers::Call;
use crate::world::until;

#[tokio::test(flavor = "multi_thread")]
async fn a_move_waits_for_its_target_to_fetch_the_image_and_tells_how_far_it_is() {
    let set = Set::new().await;
    *set.movers.target_fetches.lock() = true;
    let id = begin(&set.server, &set.id, &options()).await.unwrap();
    let told = until("the fetch to be told", async || {
        Some(operation(&set.server, &id).await).filter(|told| told.message.contains("fetches its image"))
    })
    .await;
    assert_eq!((told.done, told.total, told.phase.as_str()), (1 << 20, 2 << 20, "preparing"));
    assert_eq!(set.movers.seen.lock().count(Call::Begin), 0, "it was begun without its image");
    *set.movers.target_fetches.lock() = false;
    let done = ended(&set.server, &id).await;
    assert_eq!(done.state, OperationState::Succeeded, "{}", done.message);
    set.is_moved().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_is_committed_only_once_everything_has_reached_the_target() {
    let set = Set::new().await;
    *set.movers.is_on_its_way.lock() = true;
    let id = begin(&set.server, &set.id, &options()).await.unwrap();
    until("the target to be asked again", async || {
        (set.movers.seen.lock().count(Call::AskTarget) >= 3).then_some(())
    })
    .await;
    assert_eq!(set.record().await.epoch.0, 1, "it was committed while a part of it was on its way");
    *set.movers.is_on_its_way.lock() = false;
    let done = ended(&set.server, &id).await;
    assert_eq!(done.state, OperationState::Succeeded, "{}", done.message);
    set.is_moved().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_whose_end_is_lost_on_its_way_leaves_it_where_it_was() {
    let set = Set::new().await;
    *set.movers.is_on_its_way.lock() = true;
    let done = set.fails().await;
    assert!(done.message.contains("did not reach node"), "{}", done.message);
    set.is_as_before().await;
}
