//! Floor 4: the door for HTTP. What goes over it is in [`types`] (JSON bodies) and [`stream`] (the framing of upgraded
//! connections); both are pure and shared with the client in `ctl`. The rest is the server: it knows HTTP and the
//! agent's door, nothing below that.
#![forbid(unsafe_code)]

mod body;
mod bridge;
mod convert;
mod error;
mod handlers;
mod http;
mod listen;
mod metadata;
mod peer;
mod peer_link;
mod peer_tls;
mod routes;
mod run;
mod stall;
mod store_link;
pub mod stream;
pub mod types;

pub use error::ApiError;
pub use listen::ListenError;
pub use routes::{Served, document, router};
pub use run::{RunError, RunOptions, run};

#[cfg(test)]
mod fabric_fixture;
#[cfg(test)]
mod tests;
