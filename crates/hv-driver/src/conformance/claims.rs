//! Every claim of the suite, each with the row of the table that it belongs to.

/// Makes one test of each claim. `$setup` is an async function that returns an `Option` of a [`Subject`]: `None` if
/// the runtime is not there, which it has then reported as skipped.
///
/// [`Subject`]: crate::conformance::Subject
#[macro_export]
macro_rules! driver_conformance {
    ($setup:path) => {
        $crate::driver_conformance! { @claims $setup;
            lifecycle[life_cycle]: nothing_is_there_at_first,
            lifecycle[life_cycle]: create_prepares_without_running,
            lifecycle[life_cycle]: create_repeated_changes_nothing,
            lifecycle[life_cycle]: start_repeated_runs_one_copy,
            lifecycle[life_cycle]: a_graceful_stop_ends_the_guest,
            lifecycle[life_cycle]: a_forced_stop_ends_the_guest,
            lifecycle[life_cycle]: a_stopped_instance_starts_again,
            lifecycle[pause]: pause_and_resume_are_idempotent,
            lifecycle[pause]: a_paused_instance_can_be_stopped,
            lifecycle[life_cycle]: delete_leaves_nothing,
            lifecycle[life_cycle]: delete_of_a_running_instance_leaves_nothing,
            lifecycle[life_cycle]: a_half_created_instance_is_completed_by_create,
            lifecycle[life_cycle]: a_half_created_instance_is_found_and_deleted,
            lifecycle[life_cycle]: names_with_commas_quotes_and_umlauts_are_harmless,
            lifecycle[life_cycle]: instances_do_not_disturb_each_other,
            lifecycle[life_cycle]: a_guest_that_powers_off_has_finished,
            lifecycle[life_cycle]: an_unexpected_end_is_told,
            recovery[recovery]: a_running_instance_outlives_the_driver,
            recovery[pause]: a_paused_instance_outlives_the_driver,
            recovery[recovery]: a_stopped_instance_keeps_its_exit,
            recovery[recovery]: a_created_instance_is_found_again,
            recovery[recovery]: an_absent_instance_is_absent,
            recovery[recovery]: an_end_while_nobody_watched_is_known,
            recovery[recovery]: a_kill_while_nobody_watched_is_no_success,
            recovery[recovery]: an_end_after_recovery_is_told,
            recovery[recovery]: a_handle_of_another_version_does_no_harm,
            fencing[fencing]: a_fenced_instance_is_gone_and_starts_again_when_told,
            fencing[fencing]: an_instance_is_fenced_while_nobody_drives_it,
            fencing[fencing]: fencing_what_does_not_run_does_no_harm,
            output[console]: the_console_greets_and_echoes,
            output[console]: two_consoles_see_the_same,
            output[console]: a_late_console_sees_the_history,
            output[console]: a_console_ends_with_its_instance,
            output[console]: a_dropped_console_does_not_disturb,
            output[console]: the_history_outlives_the_driver,
            output[logs]: logs_are_read_by_lines_also_when_stopped,
            output[logs]: followed_logs_end_with_the_instance,
            output[stats]: counters_never_fall,
            output[life_cycle]: reads_come_at_any_time,
            refusal[images]: an_unknown_image_is_refused_and_leaves_nothing,
            refusal[refusals]: an_unknown_instance_is_not_found,
            refusal[refusals]: what_does_not_run_refuses_what_needs_running,
            refusal[refusals]: what_it_cannot_do_is_refused_as_unsupported,
            refusal[images]: the_images_listed_can_be_started,
            updates[update]: what_is_changed_is_true_after_a_restart,
            updates[update]: an_update_of_what_does_not_run_is_done_at_once,
            updates[update]: the_same_update_again_changes_nothing,
            updates[update]: an_update_outlives_the_driver,
            updates[update]: what_can_never_be_is_refused_and_changes_nothing,
            updates[update]: a_disk_never_shrinks,
            updates[resize_live]: cores_and_memory_grow_while_it_runs_or_later,
            updates[hotplug_disk]: a_disk_comes_and_goes_while_it_runs_or_later,
            updates[hotplug_network]: a_network_is_changed_while_it_runs_or_later,
            snapshots[snapshot]: a_snapshot_is_there_once_however_often_it_is_asked_for,
            snapshots[snapshot]: a_revert_undoes_what_came_after,
            snapshots[snapshot]: a_snapshot_of_the_disks_leaves_a_running_instance_alone,
            snapshots[snapshot]: snapshots_outlive_the_driver,
            snapshots[snapshot]: a_half_written_snapshot_is_never_listed,
            snapshots[snapshot]: what_is_no_name_is_refused,
            snapshots[snapshot]: nobody_returns_to_what_is_not_there,
            snapshots[snapshot_memory]: a_snapshot_with_memory_goes_on_where_it_was,
            snapshots[snapshot_memory]: what_stood_still_stands_still_again,
            snapshots[snapshot_memory]: what_was_stopped_goes_on_from_memory,
            clones[clone]: a_clone_is_an_instance_of_its_own,
            clones[clone]: a_clone_asked_for_twice_is_one,
            clones[clone]: a_fleet_starts_from_one_snapshot,
            clones[clone]: a_clone_with_memory_goes_on_where_the_snapshot_was,
            migration[migrate]: what_moves_with_shared_disks_goes_on_at_the_target,
            migration[migrate_storage]: what_moves_with_its_disks_goes_on_at_the_target,
            migration[migration]: what_waits_does_not_run,
            migration[migration]: a_second_request_changes_nothing,
            migration[migration]: what_was_handed_over_never_runs_here_again,
            migration[migration]: an_abort_before_the_hand_over_leaves_it_here,
            migration[migration]: an_abort_in_each_phase_leaves_it_here,
            migration[migration]: an_abort_after_the_hand_over_brings_it_back,
            migration[migration]: a_target_that_gives_up_leaves_it_at_the_source,
            migration[migration]: both_sides_outlive_their_drivers,
            migration[migration]: what_ends_on_its_way_ends_once,
            commands[exec]: a_command_says_how_it_ended,
            commands[exec]: a_command_reads_what_is_typed,
            commands[exec]: a_command_sees_its_variables,
            commands[exec]: both_outputs_come_apart,
            commands[exec]: an_unknown_command_fails_and_harms_nothing,
            commands[exec_tty]: a_terminal_has_a_size_that_changes,
            logs[logs]: nothing_printed_since_is_missing,
            logs[logs]: what_is_kept_has_a_bound,
            options[limits]: limits_are_kept_or_refused,
            options[volumes]: a_volume_is_mounted_or_refused,
            options[user_data]: user_data_is_taken_or_refused,
            options[direct_boot]: a_kernel_is_booted_or_refused,
            options[display]: a_screen_is_served_or_refused,
            options[rescue]: what_has_no_operation_is_not_promised,
            options[fetched_images]: an_image_of_the_store_is_started_or_refused,
            options[fetched_images]: an_image_that_is_not_there_is_refused,
        }
    };
    (@claims $setup:path; $($family:ident[$row:ident]: $claim:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $claim() {
                let report = $crate::conformance::report::Report {
                    suite: env!("CARGO_PKG_NAME"),
                    row: stringify!($row),
                    claim: stringify!($claim),
                };
                match $setup().await {
                    Some(subject) => report.of(&subject, $crate::conformance::$family::$claim(&subject)).await,
                    None => report.not_here(),
                }
            }
        )*
    };
}
