//! Network interfaces one at a time, by ioctl(2). A listing by rtnetlink tells all that the kernel knows of each, which
//! costs an emulated kernel 70 ms for one interface; a question here costs less than one.
#![expect(unsafe_code, reason = "system calls with pointers")]

use super::file::Fd;
use super::raw::{Errno, syscall};
use super::socket::datagram_socket;

const IOCTL: u64 = 16;

const SIOCGIFNAME: u32 = 0x8910;
const SIOCGIFFLAGS: u32 = 0x8913;
const SIOCSIFFLAGS: u32 = 0x8914;
const SIOCSIFHWADDR: u32 = 0x8924;
const SIOCGIFHWADDR: u32 = 0x8927;

const NAME_BYTES: usize = 16;
const ARPHRD_ETHER: u16 = 1;

/// `struct ifreq`: a name, and what is asked for in a union of 24 bytes.
#[derive(Clone, Copy)]
struct Request([u8; 40]);

impl Request {
    fn named(name: &[u8]) -> Result<Self, Errno> {
        let mut request = Self([0; 40]);
        // The last byte of a name is null.
        let space = request.0.get_mut(..name.len()).filter(|_| name.len() < NAME_BYTES).ok_or(Errno::INVAL)?;
        space.copy_from_slice(name);
        Ok(request)
    }

    fn name(&self) -> &[u8] {
        self.0[..NAME_BYTES].split(|byte| *byte == 0).next().unwrap_or_default()
    }

    fn value<const N: usize>(&self) -> [u8; N] {
        let mut value = [0; N];
        for (to, from) in value.iter_mut().zip(&self.0[NAME_BYTES..]) {
            *to = *from;
        }
        value
    }

    fn with(mut self, value: &[u8]) -> Self {
        for (to, from) in self.0[NAME_BYTES..].iter_mut().zip(value) {
            *to = *from;
        }
        self
    }
}

/// Whom to ask.
pub(crate) struct Interfaces(Fd);

/// What an interface is.
pub(crate) struct InterfaceFacts {
    /// Its name, of which `name_bytes` count.
    name: [u8; NAME_BYTES],
    name_bytes: usize,
    /// Its hardware address; zeros when it has none of six bytes.
    pub(crate) mac: [u8; 6],
    /// IFF_UP and others.
    pub(crate) flags: u16,
}

impl InterfaceFacts {
    /// Its name.
    pub(crate) fn name(&self) -> &[u8] {
        self.name.get(..self.name_bytes).unwrap_or_default()
    }
}

impl Interfaces {
    /// Makes ready to ask.
    pub(crate) fn new() -> Result<Self, Errno> {
        datagram_socket().map(Self)
    }

    fn ask(&self, question: u32, mut request: Request) -> Result<Request, Errno> {
        // SAFETY: these read and write one struct ifreq, which is these 40 bytes.
        unsafe { syscall!(IOCTL, self.0.number(), question, request.0.as_mut_ptr()) }?;
        Ok(request)
    }

    /// The interface of this index; `NODEV` when there is none.
    pub(crate) fn facts(&self, index: u32) -> Result<InterfaceFacts, Errno> {
        let named = self.ask(SIOCGIFNAME, Request([0; 40]).with(&index.to_le_bytes()))?;
        let named = Request::named(named.name())?;
        let [k0, k1, mac @ ..] = self.ask(SIOCGIFHWADDR, named)?.value::<8>();
        let mac = if u16::from_le_bytes([k0, k1]) == ARPHRD_ETHER { mac } else { [0; 6] };
        let flags = u16::from_le_bytes(self.ask(SIOCGIFFLAGS, named)?.value());
        let mut name = [0; NAME_BYTES];
        name.copy_from_slice(&named.0[..NAME_BYTES]);
        Ok(InterfaceFacts { name, name_bytes: named.name().len(), mac, flags })
    }

    /// Gives an Ethernet interface another hardware address.
    pub(crate) fn set_hardware_address(&self, name: &[u8], mac: [u8; 6]) -> Result<(), Errno> {
        let [k0, k1] = ARPHRD_ETHER.to_le_bytes();
        let [a, b, c, d, e, f] = mac;
        self.ask(SIOCSIFHWADDR, Request::named(name)?.with(&[k0, k1, a, b, c, d, e, f])).map(drop)
    }
}

/// Brings the loopback interface up; the kernel gives it its addresses.
pub(crate) fn loopback_up() -> Result<(), Errno> {
    const IFF_UP: u16 = 1;
    let request = Request::named(b"lo")?.with(&IFF_UP.to_le_bytes());
    Interfaces::new()?.ask(SIOCSIFFLAGS, request).map(drop)
}
