//! Tier 0: the client, as a built binary, against a fake agent on a unix socket: words, exit codes, what goes to which
//! stream, and streams that are long, stuck or broken. Needs nothing but this machine.

#[path = "cli/attach.rs"]
mod attach;
#[path = "cli/calls.rs"]
mod calls;
#[path = "cli/exec.rs"]
mod exec;
#[path = "cli/fake.rs"]
mod fake;
#[path = "cli/launch.rs"]
mod launch;
#[path = "cli/run.rs"]
mod run;
#[path = "cli/words.rs"]
mod words;
