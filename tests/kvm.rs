//! Tier 3: real guests, driven from outside through the command line and the API as a user would.
//!
//! Needs root, /dev/kvm, `HEARTH_IMAGES` with the demo image, `HEARTH_BINARY` (of the profile `checked`, or a release build), `HEARTH_PROBE` (the traffic
//! tool for guests) and `HEARTH_PREVIOUS` (`scripts/previous-version`); `scripts/test kvm` provides them. Whatever is missing is a failure. A boot takes seconds, so
//! the tests run in order and share guests: that is why this program has its own main. Words on the command line select
//! tests by part of their name.

#![expect(clippy::disallowed_methods, reason = "it looks from outside, by the host's own clock and files")]

mod kvm {
    pub(crate) mod adoption;
    pub(crate) mod balloon;
    pub(crate) mod bundle_harm;
    pub(crate) mod bundle_kills;
    pub(crate) mod bundle_many;
    pub(crate) mod bundles;
    pub(crate) mod clusters;
    pub(crate) mod console;
    pub(crate) mod devices;
    pub(crate) mod ends;
    pub(crate) mod exec;
    pub(crate) mod fabric;
    pub(crate) mod faults;
    pub(crate) mod fixture;
    pub(crate) mod forbidden;
    pub(crate) mod full;
    pub(crate) mod hand_over;
    pub(crate) mod host_harm;
    pub(crate) mod imported;
    pub(crate) mod jail;
    pub(crate) mod kept;
    pub(crate) mod lab;
    pub(crate) mod lazy;
    pub(crate) mod many;
    pub(crate) mod migrate;
    pub(crate) mod moves;
    pub(crate) mod network;
    pub(crate) mod outside;
    pub(crate) mod pause;
    pub(crate) mod pool;
    pub(crate) mod prefault;
    pub(crate) mod probe;
    pub(crate) mod prove;
    pub(crate) mod refusals;
    pub(crate) mod root_volume;
    pub(crate) mod store;
    pub(crate) mod storm;
    pub(crate) mod swap;
    pub(crate) mod swap_harm;
    pub(crate) mod terminal;
    pub(crate) mod trust;
    pub(crate) mod unfit;
    pub(crate) mod versions;
    pub(crate) mod volume_moves;
    pub(crate) mod volumes;
    pub(crate) mod witness;
}

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use kvm::fixture::{Agent, Host};

/// A test: its name and what it does with the shared agent.
type Test = (&'static str, fn(&Agent));

/// Tests that run only when they are asked for: they need `HEARTH_DEBIAN`, an image that `scripts/test debian` makes.
const ON_REQUEST: &str = "debian_";

/// In this order: what everything else needs first; tests that restart the agent or fill the host last.
const TESTS: &[Test] = &[
    ("exec_prints_the_guests_kernel", kvm::exec::prints_the_guests_kernel),
    ("vmm_holds_nothing_but_what_it_was_handed", kvm::jail::holds_nothing_but_what_it_was_handed),
    ("jail_is_reported_as_it_is", kvm::jail::is_reported_as_it_is),
    ("jail_holds_nothing_of_another_vm", kvm::jail::holds_nothing_of_another_vm),
    ("jail_a_forbidden_call_ends_that_vm_and_no_other", kvm::forbidden::a_forbidden_call_ends_that_vm_and_no_other),
    ("exec_returns_exit_codes_and_signals", kvm::exec::returns_exit_codes_and_signals),
    ("exec_of_a_missing_program_says_so", kvm::exec::of_a_missing_program_says_so),
    ("exec_carries_8_mib_both_ways", kvm::exec::carries_8_mib_both_ways),
    ("exec_runs_16_at_once", kvm::exec::runs_16_at_once),
    ("exec_ends_at_its_time_out", kvm::exec::ends_at_its_time_out),
    ("exec_with_a_reader_that_never_reads_stays_bounded", kvm::exec::with_a_reader_that_never_reads_stays_bounded),
    ("exec_ends_the_program_when_the_client_hangs_up", kvm::exec::ends_the_program_when_the_client_hangs_up),
    ("console_shows_history_and_takes_input", kvm::console::shows_history_and_takes_input),
    ("console_is_left_by_its_key", kvm::terminal::console_is_left_by_its_key),
    ("exec_gives_a_terminal", kvm::terminal::exec_gives_a_terminal),
    ("console_flood_is_bounded", kvm::console::flood_is_bounded),
    ("pause_stops_the_counter_and_resume_goes_on", kvm::pause::stops_the_counter_and_resume_goes_on),
    ("net_frames_pass_both_ways", kvm::devices::net_frames_pass_both_ways),
    ("net_limits_delay_and_lose_nothing", kvm::devices::net_limits_delay_and_lose_nothing),
    ("probe_runs_in_a_guest", kvm::probe::runs_in_a_guest),
    ("blk_file_system_written_in_the_guest_is_clean", kvm::devices::blk_file_system_written_in_the_guest_is_clean),
    ("balloon_gives_memory_back_and_has_it_again", kvm::balloon::gives_memory_back_and_has_it_again),
    ("balloon_free_memory_is_reported", kvm::balloon::free_memory_is_reported),
    ("balloon_of_a_clone_goes_on_as_it_was", kvm::balloon::of_a_clone_goes_on_as_it_was),
    ("guest_ends_are_told_apart", kvm::ends::are_told_apart),
    ("killed_vmm_is_failed_with_its_last_lines", kvm::ends::killed_vmm_is_failed_with_its_last_lines),
    ("bad_launches_are_refused_and_leave_nothing", kvm::refusals::bad_launches_are_refused_and_leave_nothing),
    ("bad_images_are_refused_and_leave_nothing", kvm::refusals::bad_images_are_refused_and_leave_nothing),
    ("bad_requests_are_refused", kvm::refusals::bad_requests_are_refused),
    ("second_agent_is_refused", kvm::refusals::second_agent_is_refused),
    (
        "jail_an_adopted_vm_that_makes_a_forbidden_call_is_told_as_such",
        kvm::forbidden::an_adopted_vm_that_makes_a_forbidden_call_is_told_as_such,
    ),
    ("agent_killed_while_vms_run_is_followed_by_one_that_serves_them", kvm::adoption::next_agent_serves_running_vms),
    ("upgrade_a_vmm_of_the_version_before_is_adopted", kvm::adoption::a_vmm_of_the_version_before_is_adopted),
    ("bundle_ten_clones_are_ten_others", kvm::bundles::ten_clones_are_ten_others),
    (
        "bundle_snapshots_hold_what_was_there_and_differences_build_on_them",
        kvm::bundles::snapshots_hold_what_was_there_and_differences_build_on_them,
    ),
    ("bundle_ten_cycles_lose_nothing_under_load", kvm::bundles::ten_cycles_lose_nothing_under_load),
    ("cluster_members_register_and_calculate", kvm::clusters::members_register_and_calculate),
    ("bundle_harmed_ones_start_nothing", kvm::bundle_harm::harmed_bundles_start_nothing),
    ("bundle_full_disk_costs_no_vm", kvm::bundle_harm::a_full_disk_costs_no_vm),
    ("bundle_agents_killed_in_the_middle_are_made_good", kvm::bundle_kills::agents_killed_in_the_middle_are_made_good),
    ("bundle_vmms_killed_in_the_middle_are_told_of", kvm::bundle_kills::vmms_killed_in_the_middle_are_told_of),
    (
        "bundle_hundred_in_a_row_and_thirty_at_once_leave_nothing",
        kvm::bundle_many::a_hundred_in_a_row_and_thirty_at_once_leave_nothing,
    ),
    ("pool_launches_take_what_is_ready_and_are_others", kvm::pool::launches_take_what_is_ready_and_are_others),
    ("volumes_outlive_guests_daemons_and_agents", kvm::volumes::outlive_guests_daemons_and_agents),
    (
        "volumes_that_move_lose_nothing_whatever_becomes_of_lease_and_source",
        kvm::volume_moves::lose_nothing_whatever_becomes_of_lease_and_source,
    ),
    ("volumes_a_root_is_written_kept_and_clean", kvm::root_volume::is_written_kept_and_clean),
    ("debian_boots_and_keeps_what_is_installed", kvm::root_volume::debian_boots_and_keeps_what_is_installed),
    ("lazy_guests_run_while_their_memory_comes", kvm::lazy::guests_run_while_their_memory_comes),
    ("lazy_half_of_it_is_away", kvm::lazy::half_of_it_is_away),
    ("lazy_thirty_at_once_of_a_bundle_that_is_coming", kvm::lazy::thirty_at_once_of_a_bundle_that_is_coming),
    ("lazy_what_does_not_come_ends_who_waits_for_it", kvm::lazy::what_does_not_come_ends_who_waits_for_it),
    ("lazy_agents_that_end_meanwhile", kvm::lazy::agents_that_end_meanwhile),
    ("kept_what_is_unused_for_longest_gives_way", kvm::kept::what_is_unused_for_longest_gives_way),
    ("prefault_what_is_reached_first_is_mapped_ahead", kvm::prefault::what_is_reached_first_is_mapped_ahead),
    (
        "trust_a_bundle_leaves_its_host_and_is_asked_who_signed_it",
        kvm::trust::a_bundle_leaves_its_host_and_is_asked_who_signed_it,
    ),
    ("image_containers_boot_and_are_bundled", kvm::imported::containers_boot_and_are_bundled),
    ("swap_out_and_back_loses_nothing", kvm::swap::out_and_back_loses_nothing),
    ("swap_takes_idle_vms_and_leaves_busy_ones", kvm::swap_harm::takes_idle_vms_and_leaves_busy_ones),
    ("swap_with_harm_costs_no_vm_that_lives", kvm::swap_harm::harm_costs_no_vm_that_lives),
    ("hand_over_to_another_process_loses_nothing", kvm::hand_over::to_another_process_loses_nothing),
    ("hand_over_with_harm_costs_no_vm", kvm::hand_over::with_harm_costs_no_vm),
    ("moves_are_watched_cancelled_and_refused", kvm::moves::are_watched_cancelled_and_refused),
    ("migrate_compressed_sends_less_and_loses_nothing", kvm::versions::compressed_sends_less_and_loses_nothing),
    ("migrate_between_hosts_of_two_versions_works_both_ways", kvm::versions::two_versions_work_both_ways),
    ("migrate_there_and_back_loses_nothing", kvm::migrate::there_and_back_loses_nothing),
    ("migrate_to_a_host_whose_disk_fills_up_costs_no_vm", kvm::full::a_target_that_fills_up_costs_no_vm),
    ("prove_many_migrations_lose_nothing", kvm::prove::many_migrations_lose_nothing),
    ("prove_faults_leave_one_copy", kvm::faults::leave_one_copy),
    ("host_wall_clock_that_is_set_changes_no_vm", kvm::host_harm::a_wall_clock_that_is_set_changes_no_vm),
    ("host_drain_stops_the_vms_and_says_so", kvm::host_harm::a_drain_stops_the_vms_and_says_so),
    ("host_ledger_put_back_finds_the_vms_it_knows", kvm::host_harm::a_ledger_put_back_finds_the_vms_it_knows),
    ("host_packets_beyond_a_sleepers_queue_are_counted", kvm::host_harm::packets_beyond_a_sleepers_queue_are_counted),
    (
        "host_file_system_that_turns_read_only_costs_no_vm",
        kvm::host_harm::a_file_system_that_turns_read_only_costs_no_vm,
    ),
    ("adoption_of_fifty_vms_takes_less_than_a_second", kvm::adoption::fifty_vms_are_adopted_within_a_second),
    ("storm_of_a_hundred_dead_agents_loses_nothing", kvm::storm::a_hundred_dead_agents_lose_nothing),
    ("network_hosts_say_what_is_wrong", kvm::unfit::hosts_say_what_is_wrong),
    (
        "network_sessions_reach_across_hosts_and_nothing_else",
        kvm::network::sessions_reach_across_hosts_and_nothing_else,
    ),
    (
        "network_vxlan_joins_hosts_and_outside_is_reached_by_permission",
        kvm::outside::vxlan_joins_hosts_and_outside_is_reached_by_permission,
    ),
    ("six_at_once_leave_nothing", kvm::many::six_at_once_leave_nothing),
    ("soak_leaves_the_agent_as_it_was", kvm::storm::a_long_time_of_work_leaves_the_agent_as_it_was),
    ("twelve_in_a_loop_leave_nothing", kvm::many::twelve_in_a_loop_leave_nothing),
];

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let selected = |name: &str| match wanted.as_slice() {
        [] => !name.starts_with(ON_REQUEST),
        words => words.iter().any(|word| name.contains(word.as_str())),
    };
    let tests: Vec<&Test> = TESTS.iter().filter(|(name, _)| selected(name)).collect();
    println!("running {} tests", tests.len());
    let before = Host::look();
    let agent = Agent::start();
    let (mut passed, mut failed) = (0, Vec::new());
    for (name, test) in &tests {
        let started = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| test(&agent)));
        let seconds = started.elapsed().as_secs_f64();
        if result.is_ok() {
            passed += 1;
            println!("test {name} ... ok ({seconds:.1} s)");
        } else {
            failed.push(*name);
            println!("test {name} ... FAILED ({seconds:.1} s)");
        }
    }
    if !failed.is_empty() {
        println!("\nthe agent's log ends with:\n{}", agent.log_tail());
    }
    kvm::lab::forget_bundles();
    let ended = catch_unwind(AssertUnwindSafe(|| {
        agent.finish();
        before.assert_same_as_now();
    }));
    if ended.is_err() {
        failed.push("nothing_is_left_on_the_host");
    } else {
        passed += 1;
        println!("test nothing_is_left_on_the_host ... ok");
    }
    let word = if failed.is_empty() { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {word}. {passed} passed; {} failed; 0 ignored; 0 measured; {} filtered out",
        failed.len(),
        TESTS.len() - tests.len()
    );
    for name in &failed {
        println!("    {name}");
    }
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
