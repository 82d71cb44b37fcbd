//! Bytes of an NBD client at the server's handshake and requests, and of a server at the client's end: each option has one
//! last reply, nothing is told before TLS, requests that are let through lie within the export, and replies say the same
//! when they are read.
#![no_main]

use hearth::wire::nbd::negotiate::{Export, Exports, Negotiation, Next, Refused, Tls};
use hearth::wire::nbd::option::{
    Info, InfoRequest, MetaContextRequest, OPTION_HEADER_BYTES, OPTION_REPLY_HEADER_BYTES, OptionHeader,
    OptionReplyHeader, number, read_meta_context, reply_kind,
};
use hearth::wire::nbd::reply::{CHUNK_LENGTH_BYTES, ChunkHead, REPLY_BYTES, ReplyHead, chunk_length};
use hearth::wire::nbd::request::{Limits, REQUEST_BYTES, Request, RequestHeader};
use hearth::wire::nbd::{OPTION_BYTES_MAX, OPTIONS_MAX, PAYLOAD_BYTES_MAX, read_client_flags, read_greeting};
use libfuzzer_sys::fuzz_target;

struct One;

impl Exports for One {
    type Bound = ();

    fn open(&mut self, name: &str) -> Result<(Export, ()), Refused> {
        if name.len() > 1 {
            return Err(Refused::Unknown(format!("no {name:?}")));
        }
        let export = Export {
            name: "one".to_owned(),
            description: String::new(),
            size: 1 << 20,
            flags: 0x7fff,
            block_bytes: 512,
            preferred_bytes: 4096,
        };
        Ok((export, ()))
    }

    fn names(&self) -> Vec<String> {
        vec!["one".to_owned()]
    }
}

/// One option: which, whether its data is made right, and other data.
type Asked = (u32, u8, Vec<u8>);

fn handshake(tls: bool, asked: Vec<Asked>) {
    let mut negotiation = Negotiation::new(if tls { Tls::Required } else { Tls::Absent }, tls);
    let (mut count, mut running) = (0, !tls);
    for (option, right, data) in asked {
        let option = if right & 8 == 0 { option % 13 } else { option };
        let data = match right & 3 {
            0 => InfoRequest { name: "", wanted: vec![1, 2, 3] }.to_bytes(),
            1 => MetaContextRequest { name: "", queries: vec!["base:allocation"] }.to_bytes(),
            2 => Vec::new(),
            _ => data,
        };
        let mut out = Vec::new();
        count += 1;
        let Ok(next) = negotiation.take(option, &data, &mut One, &mut out) else {
            assert!(count > OPTIONS_MAX);
            return;
        };
        assert!(count <= OPTIONS_MAX);
        if let Next::Transmission(agreed) = &next {
            assert!(running && agreed.export.size == 1 << 20 && (agreed.structured || !agreed.allocation));
        }
        if option != number::EXPORT_NAME {
            replies(&out, option, running);
        }
        match next {
            Next::Option => {}
            Next::StartTls => running = true,
            Next::Transmission(_) | Next::End => return,
        }
    }
}

fn replies(mut out: &[u8], option: u32, running: bool) {
    let mut last = false;
    while let Some((head, rest)) = out.split_first_chunk::<OPTION_REPLY_HEADER_BYTES>() {
        assert!(!last, "nothing comes behind the last reply");
        let head = OptionReplyHeader::read(*head).expect("a right header");
        let (data, rest) = rest.split_at(head.length as usize);
        assert_eq!(head.option, option);
        if head.kind == reply_kind::INFO {
            assert!(running);
            let info = Info::read(data).expect("right information");
            assert_eq!(info.to_bytes(), data);
        }
        (last, out) = (head.is_last(), rest);
    }
    assert!(last && out.is_empty());
}

fuzz_target!(|input: (bool, Vec<Asked>, [u8; REQUEST_BYTES], [u8; 20], [u8; 18], u16, Vec<u8>)| {
    let (tls, asked, request, head, greeting, kind, body) = input;
    handshake(tls, asked);
    let _ = read_greeting(greeting);
    let _ = read_client_flags(*greeting.first_chunk().unwrap());
    if let Ok(header) = OptionHeader::read(*head.first_chunk::<OPTION_HEADER_BYTES>().unwrap()) {
        assert!(header.length <= OPTION_BYTES_MAX);
    }
    if let Ok(header) = OptionReplyHeader::read(head) {
        assert!(header.length <= OPTION_BYTES_MAX);
    }
    let _ = (Info::read(&body), InfoRequest::read(&body), MetaContextRequest::read(&body), read_meta_context(&body));

    let mut request = request;
    request[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
    if let Ok(header) = RequestHeader::read(request) {
        assert!(header.payload_bytes() <= PAYLOAD_BYTES_MAX && header.to_bytes() == request);
        let few = RequestHeader { flags: header.flags % 32, command: header.command % 9, ..header };
        for header in [header, few, RequestHeader { offset: header.offset % (1 << 21), length: header.length % (1 << 21), ..few }] {
            let limits = Limits {
                size: 1 << 20,
                flags: u16::from(kind & 2 != 0) << 1,
                block_bytes: 512,
                structured: kind & 1 != 0,
                allocation: kind & 4 != 0,
            };
            if let Ok(
                Request::Read { part, .. }
                | Request::Write { part, .. }
                | Request::Trim { part, .. }
                | Request::WriteZeroes { part, .. }
                | Request::Cache { part }
                | Request::BlockStatus { part, .. },
            ) = header.check(&limits)
            {
                assert!(part.length > 0 && part.offset.checked_add(part.length.into()).unwrap() <= limits.size);
            }
        }
    }

    let _ = ReplyHead::read(*head.first_chunk::<REPLY_BYTES>().unwrap());
    for kind in [kind, kind % 8, kind % 4 | 1 << 15] {
        if let Ok(length) = chunk_length(kind, *head.first_chunk::<CHUNK_LENGTH_BYTES>().unwrap()) {
            let _ = ChunkHead::read(kind, &body, length);
        }
        let _ = ChunkHead::read(kind, &body, u32::try_from(body.len()).unwrap());
    }
});
