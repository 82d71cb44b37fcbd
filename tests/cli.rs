//! Tier 0: the client, as a built binary, against a fake agent on a unix socket: words, exit codes, what goes to which
//! stream, and streams that are long, stuck or broken. And the agent as a built binary, without VMs: bounds, draining, its
//! ledger. That part needs root.

#[path = "cli/agent.rs"]
mod agent;
#[path = "cli/attach.rs"]
mod attach;
#[path = "cli/bench.rs"]
mod bench;
#[path = "cli/calls.rs"]
mod calls;
#[path = "cli/exec.rs"]
mod exec;
#[path = "cli/fake.rs"]
mod fake;
#[path = "cli/firecracker.rs"]
mod firecracker;
#[path = "cli/launch.rs"]
mod launch;
#[path = "cli/manual.rs"]
mod manual;
#[path = "cli/prometheus.rs"]
mod prometheus;
#[path = "cli/run.rs"]
mod run;
#[path = "cli/top.rs"]
mod top;
#[path = "cli/trust.rs"]
mod trust;
#[path = "cli/words.rs"]
mod words;
