//! Tier 1: the real agent on a simulated host, from a seed: clients that ask at random, guests that fail, effects that
//! fail, and agents that die between any two effects. Whatever happened, the last agent has to come to rest with
//! nothing running twice and nothing left behind.
//!
//! `HEARTH_SIM_SEED=N` runs one seed, `HEARTH_SIM_RUNS=N` that many from it on.
#![expect(clippy::expect_used, clippy::panic, reason = "tests")]

#[path = "sim/bundles.rs"]
mod bundles;
#[path = "sim/ends.rs"]
mod ends;
#[path = "sim/hand_over.rs"]
mod hand_over;
#[path = "sim/histories.rs"]
mod histories;
#[path = "sim/ledger.rs"]
mod ledger;
#[path = "sim/life.rs"]
mod life;
#[path = "sim/points.rs"]
mod points;
#[path = "sim/pools.rs"]
mod pools;
#[path = "sim/quarantine.rs"]
mod quarantine;
#[path = "sim/rest.rs"]
mod rest;
#[path = "sim/sessions.rs"]
mod sessions;
#[path = "sim/swap.rs"]
mod swap;
#[path = "sim/volumes.rs"]
mod volumes;
