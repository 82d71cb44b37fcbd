//! The handshake of one connection, by the clock: who does not come to an end of it is not waited for.

use std::sync::Arc;
use std::time::Duration;

use rustls::server::ServerConfig;

use super::line::Line;
use super::registry::Bound;
use super::serve::ServeError;
use crate::wire::nbd::negotiate::{Agreed, Exports, Negotiation, Next, Tls};
use crate::wire::nbd::option::{OPTION_HEADER_BYTES, OptionHeader};
use crate::wire::nbd::{CLIENT_FLAGS_BYTES, greeting, read_client_flags};

/// How long all of a handshake may take: a person at a prompt is not expected, a busy host is.
pub(super) const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(30);

/// Shakes hands as the server. `None`: the client ended in order, or hung up where it may.
pub(super) fn shake<E: Exports<Bound = Bound>>(
    line: &mut Line,
    tls: Option<&Arc<ServerConfig>>,
    exports: &mut E,
) -> Result<Option<Agreed<Bound>>, ServeError> {
    let deadline = line.within(HANDSHAKE_PATIENCE);
    line.write(&greeting())?;
    let mut flags = [0; CLIENT_FLAGS_BYTES];
    if !line.read_message(&mut flags, Some(deadline))? {
        return Ok(None);
    }
    let tls_wanted = if tls.is_some() { Tls::Required } else { Tls::Absent };
    let mut negotiation = Negotiation::new(tls_wanted, read_client_flags(flags)?);
    let mut data = Vec::new();
    let mut head = [0; OPTION_HEADER_BYTES];
    while line.read_message(&mut head, Some(deadline))? {
        let OptionHeader { option, length } = OptionHeader::read(head)?;
        data.resize(length as usize, 0);
        line.read_all(&mut data, deadline)?;
        let mut out = Vec::new();
        let next = negotiation.take(option, &data, exports, &mut out)?;
        line.write(&out)?;
        match (next, tls) {
            (Next::Option, _) => {}
            (Next::StartTls, Some(config)) => line.start_tls(Arc::clone(config))?,
            (Next::StartTls, None) | (Next::End, _) => return Ok(None),
            (Next::Transmission(agreed), _) => return Ok(Some(agreed)),
        }
    }
    Ok(None)
}
