//! The server's side of the handshake as a machine of states: an option comes in, replies and what happens next come
//! out. It reads and writes nothing.

use super::option::{Info, InfoRequest, MetaContextRequest, info_kind, number, put_error, put_reply, reply_kind};
use super::option::{meta_context_data, server_data};
use super::{BASE_ALLOCATION, BASE_ALLOCATION_ID, NbdError, OPTIONS_MAX, PAYLOAD_BYTES_MAX, export_flag, read_text};

/// What a server has to know of an export to tell a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// The name it is known by.
    pub name: String,
    /// For people.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// Of [`export_flag`], without those that are the protocol's own business here (HAS_FLAGS, SEND_DF).
    pub flags: u16,
    /// Offsets and lengths of requests are multiples of it.
    pub block_bytes: u32,
    /// What requests should be multiples of, in bytes.
    pub preferred_bytes: u32,
}

/// Why a name opens no export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refused {
    /// There is no such export, in words.
    Unknown(String),
    /// It is not for this client, in words.
    Policy(String),
    /// The server ends.
    Shutdown,
}

/// Where exports come from.
pub trait Exports {
    /// What a client is bound to by a name.
    type Bound;
    /// The export of this name. Asked for by INFO as well, so it takes nothing that would have to be given back.
    fn open(&mut self, name: &str) -> Result<(Export, Self::Bound), Refused>;
    /// The names that this client may know.
    fn names(&self) -> Vec<String>;
}

/// What TLS is to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    /// There is none here.
    Absent,
    /// Nothing is told before it.
    Required,
    /// It is there.
    Running,
}

/// What happens after an option.
#[derive(Debug)]
pub enum Next<B> {
    /// Another option.
    Option,
    /// A TLS handshake, then another option.
    StartTls,
    /// Requests.
    Transmission(Agreed<B>),
    /// The replies are sent, then the connection ends.
    End,
}

/// What both agreed on.
#[derive(Debug)]
pub struct Agreed<B> {
    /// The export.
    pub export: Export,
    /// What it is opened as.
    pub bound: B,
    /// Replies come in chunks.
    pub structured: bool,
    /// `base:allocation` was chosen.
    pub allocation: bool,
}

/// One handshake.
#[derive(Debug)]
pub struct Negotiation {
    tls: Tls,
    no_zeroes: bool,
    structured: bool,
    /// For the export of which name `base:allocation` was chosen.
    allocation_for: Option<String>,
    options: u32,
}

impl Negotiation {
    /// A handshake after the client's flags ([`super::read_client_flags`]).
    pub const fn new(tls: Tls, no_zeroes: bool) -> Self {
        Self { tls, no_zeroes, structured: false, allocation_for: None, options: 0 }
    }

    /// Takes an option; what is to be answered is appended to `out`.
    pub fn take<E: Exports>(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &mut E,
        out: &mut Vec<u8>,
    ) -> Result<Next<E::Bound>, NbdError> {
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return Err(NbdError::Options);
        }
        if self.tls == Tls::Required && !matches!(option, number::STARTTLS | number::ABORT) {
            if option == number::EXPORT_NAME {
                return Ok(Next::End);
            }
            put_error(out, option, reply_kind::ERR_TLS_REQD, "TLS first");
            return Ok(Next::Option);
        }
        match option {
            number::EXPORT_NAME => return Ok(self.export_name(data, exports, out)),
            number::ABORT => {
                put_reply(out, option, reply_kind::ACK, &[]);
                return Ok(Next::End);
            }
            number::STARTTLS => return Ok(self.start_tls(data, out)),
            number::INFO | number::GO => return Ok(self.info(option, data, exports, out)),
            number::LIST if data.is_empty() => {
                for name in exports.names() {
                    put_reply(out, option, reply_kind::SERVER, &server_data(&name));
                }
                put_reply(out, option, reply_kind::ACK, &[]);
            }
            number::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                put_reply(out, option, reply_kind::ACK, &[]);
            }
            number::LIST | number::STRUCTURED_REPLY => {
                put_error(out, option, reply_kind::ERR_INVALID, "this option has no data");
            }
            number::LIST_META_CONTEXT | number::SET_META_CONTEXT => self.meta_context(option, data, exports, out),
            _ => put_error(out, option, reply_kind::ERR_UNSUP, "this option is not known here"),
        }
        Ok(Next::Option)
    }

    fn start_tls<B>(&mut self, data: &[u8], out: &mut Vec<u8>) -> Next<B> {
        let (kind, text) = match (self.tls, data) {
            (Tls::Required, []) => {
                // What was agreed on in the clear counts no more.
                self.tls = Tls::Running;
                (self.structured, self.allocation_for) = (false, None);
                put_reply(out, number::STARTTLS, reply_kind::ACK, &[]);
                return Next::StartTls;
            }
            (Tls::Absent, []) => (reply_kind::ERR_UNSUP, "there is no TLS on this socket"),
            (Tls::Running, []) => (reply_kind::ERR_INVALID, "TLS runs already"),
            (_, _) => (reply_kind::ERR_INVALID, "this option has no data"),
        };
        put_error(out, number::STARTTLS, kind, text);
        Next::Option
    }

    /// The old way into the transmission: it cannot be refused but by hanging up.
    fn export_name<E: Exports>(&self, data: &[u8], exports: &mut E, out: &mut Vec<u8>) -> Next<E::Bound> {
        let Some((name, (export, bound))) = read_text(data).and_then(|name| Some((name, exports.open(name).ok()?)))
        else {
            return Next::End;
        };
        out.extend(export.size.to_be_bytes());
        out.extend(self.flags(&export).to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; 124]);
        }
        Next::Transmission(self.agreed(name, export, bound))
    }

    fn info<E: Exports>(&self, option: u32, data: &[u8], exports: &mut E, out: &mut Vec<u8>) -> Next<E::Bound> {
        let Ok(request) = InfoRequest::read(data) else {
            put_error(out, option, reply_kind::ERR_INVALID, "the data is not a name and a list of numbers");
            return Next::Option;
        };
        let (export, bound) = match exports.open(request.name) {
            Ok(opened) => opened,
            Err(refused) => {
                refuse(option, &refused, out);
                return Next::Option;
            }
        };
        let mut tell = |info: Info<'_>| put_reply(out, option, reply_kind::INFO, &info.to_bytes());
        tell(Info::Export { size: export.size, flags: self.flags(&export) });
        let (least, preferred) = (export.block_bytes, export.preferred_bytes);
        tell(Info::BlockSize { least, preferred, most: PAYLOAD_BYTES_MAX });
        if request.wanted.contains(&info_kind::NAME) {
            tell(Info::Name(&export.name));
        }
        if request.wanted.contains(&info_kind::DESCRIPTION) && !export.description.is_empty() {
            tell(Info::Description(&export.description));
        }
        put_reply(out, option, reply_kind::ACK, &[]);
        if option == number::GO {
            return Next::Transmission(self.agreed(request.name, export, bound));
        }
        Next::Option
    }

    fn meta_context<E: Exports>(&mut self, option: u32, data: &[u8], exports: &mut E, out: &mut Vec<u8>) {
        let list = option == number::LIST_META_CONTEXT;
        if !list {
            // Whatever comes of it, an earlier choice is forgotten.
            self.allocation_for = None;
            if !self.structured {
                put_error(out, option, reply_kind::ERR_INVALID, "structured replies first");
                return;
            }
        }
        let Ok(request) = MetaContextRequest::read(data) else {
            put_error(out, option, reply_kind::ERR_INVALID, "the data is not a name and a list of names");
            return;
        };
        if let Err(refused) = exports.open(request.name) {
            refuse(option, &refused, out);
            return;
        }
        if request.wants_allocation(list) {
            let id = if list { 0 } else { BASE_ALLOCATION_ID };
            put_reply(out, option, reply_kind::META_CONTEXT, &meta_context_data(id, BASE_ALLOCATION));
            if !list {
                self.allocation_for = Some(request.name.to_owned());
            }
        }
        put_reply(out, option, reply_kind::ACK, &[]);
    }

    fn flags(&self, export: &Export) -> u16 {
        export.flags | export_flag::HAS_FLAGS | if self.structured { export_flag::SEND_DF } else { 0 }
    }

    fn agreed<B>(&self, name: &str, mut export: Export, bound: B) -> Agreed<B> {
        export.flags = self.flags(&export);
        let allocation = self.allocation_for.as_deref() == Some(name);
        Agreed { export, bound, structured: self.structured, allocation }
    }
}

fn refuse(option: u32, refused: &Refused, out: &mut Vec<u8>) {
    match refused {
        Refused::Unknown(text) => put_error(out, option, reply_kind::ERR_UNKNOWN, text),
        Refused::Policy(text) => put_error(out, option, reply_kind::ERR_POLICY, text),
        Refused::Shutdown => put_error(out, option, reply_kind::ERR_SHUTDOWN, "the server ends"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::nbd::option::{OPTION_REPLY_HEADER_BYTES, OptionReplyHeader};
    use proptest::prelude::*;

    struct One;

    impl Exports for One {
        type Bound = u8;

        fn open(&mut self, name: &str) -> Result<(Export, u8), Refused> {
            match name {
                "one" => Ok((
                    Export {
                        name: "one".to_owned(),
                        description: "the only one".to_owned(),
                        size: 4096,
                        flags: export_flag::SEND_FLUSH,
                        block_bytes: 512,
                        preferred_bytes: 4096,
                    },
                    1,
                )),
                "other" => Err(Refused::Policy("not for you".to_owned())),
                _ => Err(Refused::Unknown(format!("no export {name:?}"))),
            }
        }

        fn names(&self) -> Vec<String> {
            vec!["one".to_owned()]
        }
    }

    /// Kinds of the replies, and the texts of errors.
    fn replies(mut bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let mut found = Vec::new();
        while let Some((head, rest)) = bytes.split_first_chunk::<OPTION_REPLY_HEADER_BYTES>() {
            let head = OptionReplyHeader::read(*head).unwrap();
            let (data, rest) = rest.split_at(head.length as usize);
            found.push((head.kind, data.to_vec()));
            bytes = rest;
        }
        assert!(bytes.is_empty());
        found
    }

    fn take(negotiation: &mut Negotiation, option: u32, data: &[u8]) -> (Vec<u32>, Next<u8>) {
        let mut out = Vec::new();
        let next = negotiation.take(option, data, &mut One, &mut out).unwrap();
        (replies(&out).into_iter().map(|(kind, _)| kind).collect(), next)
    }

    fn go(name: &str) -> Vec<u8> {
        InfoRequest { name, wanted: vec![info_kind::NAME] }.to_bytes()
    }

    #[test]
    fn a_client_finds_its_export() {
        let mut negotiation = Negotiation::new(Tls::Absent, true);
        let (kinds, _) = take(&mut negotiation, number::STARTTLS, &[]);
        assert_eq!(kinds, [reply_kind::ERR_UNSUP]);
        let (kinds, _) = take(&mut negotiation, number::EXTENDED_HEADERS, &[]);
        assert_eq!(kinds, [reply_kind::ERR_UNSUP]);
        let meta = MetaContextRequest { name: "one", queries: vec![BASE_ALLOCATION] }.to_bytes();
        let (kinds, _) = take(&mut negotiation, number::SET_META_CONTEXT, &meta);
        assert_eq!(kinds, [reply_kind::ERR_INVALID], "not before structured replies");
        take(&mut negotiation, number::STRUCTURED_REPLY, &[]);
        let (kinds, _) = take(&mut negotiation, number::SET_META_CONTEXT, &meta);
        assert_eq!(kinds, [reply_kind::META_CONTEXT, reply_kind::ACK]);
        let (kinds, _) = take(&mut negotiation, number::LIST, &[]);
        assert_eq!(kinds, [reply_kind::SERVER, reply_kind::ACK]);
        for (name, wanted) in [("two", reply_kind::ERR_UNKNOWN), ("other", reply_kind::ERR_POLICY)] {
            let (kinds, next) = take(&mut negotiation, number::GO, &go(name));
            assert_eq!(kinds, [wanted]);
            assert!(matches!(next, Next::Option));
        }
        let (kinds, next) = take(&mut negotiation, number::INFO, &go("one"));
        assert_eq!(kinds, [reply_kind::INFO, reply_kind::INFO, reply_kind::INFO, reply_kind::ACK]);
        assert!(matches!(next, Next::Option));
        let (_, next) = take(&mut negotiation, number::GO, &go("one"));
        let Next::Transmission(agreed) = next else { panic!("{next:?}") };
        assert!(agreed.structured && agreed.allocation && agreed.bound == 1);
        assert_eq!(agreed.export.flags, export_flag::HAS_FLAGS | export_flag::SEND_FLUSH | export_flag::SEND_DF);
    }

    #[test]
    fn a_context_is_for_the_export_it_was_chosen_for() {
        let mut negotiation = Negotiation::new(Tls::Absent, true);
        take(&mut negotiation, number::STRUCTURED_REPLY, &[]);
        let meta = |name| MetaContextRequest { name, queries: vec![BASE_ALLOCATION] }.to_bytes();
        take(&mut negotiation, number::SET_META_CONTEXT, &meta("one"));
        let (kinds, _) = take(&mut negotiation, number::SET_META_CONTEXT, &meta("two"));
        assert_eq!(kinds, [reply_kind::ERR_UNKNOWN]);
        let (_, next) = take(&mut negotiation, number::GO, &go("one"));
        assert!(matches!(next, Next::Transmission(Agreed { allocation: false, .. })));
    }

    #[test]
    fn the_old_way_in() {
        for (no_zeroes, bytes) in [(true, 10), (false, 134)] {
            let mut negotiation = Negotiation::new(Tls::Absent, no_zeroes);
            let mut out = Vec::new();
            let next = negotiation.take(number::EXPORT_NAME, b"one", &mut One, &mut out).unwrap();
            assert!(matches!(next, Next::Transmission(_)) && out.len() == bytes);
            assert_eq!(out[..10], [0, 0, 0, 0, 0, 0, 16, 0, 0, 5]);
            let next = negotiation.take(number::EXPORT_NAME, b"two", &mut One, &mut Vec::new()).unwrap();
            assert!(matches!(next, Next::End));
        }
    }

    #[test]
    fn nothing_is_told_before_tls() {
        let mut negotiation = Negotiation::new(Tls::Required, true);
        for option in [number::LIST, number::INFO, number::GO, number::STRUCTURED_REPLY, 77] {
            let (kinds, _) = take(&mut negotiation, option, &go("one"));
            assert_eq!(kinds, [reply_kind::ERR_TLS_REQD]);
        }
        let mut out = Vec::new();
        assert!(matches!(negotiation.take(number::EXPORT_NAME, b"one", &mut One, &mut out), Ok(Next::End)));
        assert!(out.is_empty());
        assert_eq!(take(&mut negotiation, number::STARTTLS, b"x").0, [reply_kind::ERR_INVALID]);
        let (kinds, next) = take(&mut negotiation, number::STARTTLS, &[]);
        assert!(kinds == [reply_kind::ACK] && matches!(next, Next::StartTls));
        assert_eq!(take(&mut negotiation, number::STARTTLS, &[]).0, [reply_kind::ERR_INVALID]);
        assert!(matches!(take(&mut negotiation, number::GO, &go("one")).1, Next::Transmission(_)));
    }

    #[test]
    fn options_come_to_an_end() {
        let mut negotiation = Negotiation::new(Tls::Absent, true);
        for _ in 0..OPTIONS_MAX {
            take(&mut negotiation, number::LIST, &[]);
        }
        let more = negotiation.take(number::LIST, &[], &mut One, &mut Vec::new());
        assert_eq!(more.map(|_| ()), Err(NbdError::Options));
    }

    proptest! {
        #[test]
        fn every_option_has_a_last_reply(options in proptest::collection::vec((0_u32..13, any::<Vec<u8>>(), any::<bool>()), 1..40), tls: bool) {
            let mut negotiation = Negotiation::new(if tls { Tls::Required } else { Tls::Absent }, true);
            for (option, data, sensible) in options {
                let data = if sensible { go("one") } else { data };
                let mut out = Vec::new();
                let next = negotiation.take(option, &data, &mut One, &mut out).unwrap();
                if option == number::EXPORT_NAME {
                    break;
                }
                let said = replies(&out);
                prop_assert!(!said.is_empty());
                for (at, (kind, _)) in said.iter().enumerate() {
                    let last = *kind == reply_kind::ACK || kind & reply_kind::ERROR != 0;
                    prop_assert_eq!(last, at + 1 == said.len());
                }
                if matches!(next, Next::End | Next::Transmission(_)) {
                    break;
                }
            }
        }
    }
}
