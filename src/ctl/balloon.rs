//! `hearth vm balloon`, and what `hearth vm stats` shows of it.

use super::Error;
use super::call::{Agent, PROMPT};
use super::output::Output;
use super::table::{bytes, milliseconds, pairs};
use super::vm::path;
use crate::api::types::{BalloonRequest, BalloonStats};
use crate::cli::BalloonArgs;

pub(super) async fn set(agent: &Agent, out: Output, args: BalloonArgs) -> Result<(), Error> {
    let BalloonArgs { vm, target } = args;
    let request = BalloonRequest { target_mib: target };
    let stats: BalloonStats = agent.post(&format!("{}/balloon", path(&vm)), &request, PROMPT).await?;
    out.value(&stats, |stats| {
        let (target, actual) = (bytes(stats.target_bytes), bytes(stats.actual_bytes));
        format!("balloon of {}: to hold {target}, holds {actual}", vm.as_str())
    })?;
    Ok(())
}

/// Rows for the statistics of a VM.
pub(super) fn rows(balloon: &BalloonStats) -> String {
    let guest = balloon.guest.as_ref();
    pairs([
        ("balloon target", Some(bytes(balloon.target_bytes))),
        ("balloon holds", Some(bytes(balloon.actual_bytes))),
        ("balloon reported free", Some(bytes(balloon.reported_bytes))),
        ("guest kernel said", guest.map(|guest| format!("{} ago", milliseconds(guest.age_ms)))),
        ("guest total", guest.and_then(|guest| guest.total_bytes).map(bytes)),
        ("guest free", guest.and_then(|guest| guest.free_bytes).map(bytes)),
        ("guest available", guest.and_then(|guest| guest.available_bytes).map(bytes)),
        ("guest disk caches", guest.and_then(|guest| guest.disk_caches_bytes).map(bytes)),
        ("guest swap in", guest.and_then(|guest| guest.swap_in_bytes).map(bytes)),
        ("guest swap out", guest.and_then(|guest| guest.swap_out_bytes).map(bytes)),
        ("guest major faults", guest.and_then(|guest| guest.major_faults).map(|count| count.to_string())),
        ("guest minor faults", guest.and_then(|guest| guest.minor_faults).map(|count| count.to_string())),
    ])
}
