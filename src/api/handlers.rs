//! One function per route: parse, one call to the agent, answer. No decisions.

pub(super) mod balloon;
pub(super) mod bundles;
pub(super) mod calculations;
pub(super) mod clusters;
pub(super) mod exec;
pub(super) mod fetches;
pub(super) mod host;
pub(super) mod images;
pub(super) mod migrations;
pub(super) mod operations;
pub(super) mod pools;
pub(super) mod sessions;
pub(super) mod swap;
pub(super) mod transfers;
pub(super) mod vms;
pub(super) mod volumes;
