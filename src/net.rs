//! Floor 2: session networks. What should be on a host, what is there, and the steps between the two; pure, but for
//! [`host`], which carries the steps out over `sys`. Runs on the agent's blocking threads and knows neither the ledger
//! nor tokio. Only [`address`] knows what a session is: the rest sees prefixes, masks and addresses.
#![forbid(unsafe_code)]

pub mod address;
pub mod desired;
mod ground;
pub mod host;
pub mod member;
pub mod object;
pub mod plan;
pub mod rules;
pub mod watch;
