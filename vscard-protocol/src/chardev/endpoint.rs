//! The grammar for where a byte stream comes from.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

/// Where a byte stream comes from.
///
/// Written `kind:address`, then options after commas; a comma inside a value is doubled, as QEMU does. An IPv6
/// address stands in brackets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `tcp:HOST:PORT`: connects.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
    /// `tcp-listen:HOST:PORT`: waits for a peer. Port 0 takes a free one.
    TcpListen {
        /// Name or address to bind.
        host: String,
        /// Port.
        port: u16,
    },
    /// `unix:PATH`: connects.
    Unix {
        /// The socket.
        path: PathBuf,
    },
    /// `unix-listen:PATH`: waits for a peer.
    UnixListen {
        /// The socket to make.
        path: PathBuf,
    },
}

/// Why text is not an [`Endpoint`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("endpoint {text:?}: {problem}")]
pub struct EndpointError {
    text: String,
    problem: String,
}

impl Endpoint {
    /// Whether it waits for peers instead of connecting to one.
    pub fn is_listening(&self) -> bool {
        matches!(self, Self::TcpListen { .. } | Self::UnixListen { .. })
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let problem = |problem: String| EndpointError { text: text.to_owned(), problem };
        let (kind, rest) = text.split_once(':').ok_or_else(|| {
            problem("expected unix:PATH, unix-listen:PATH, tcp:HOST:PORT or tcp-listen:HOST:PORT".into())
        })?;
        let (address, options) = split_options(rest);
        if let Some(option) = options.first() {
            return Err(problem(format!("unknown option {option:?} (a comma in a value is written twice)")));
        }
        if address.contains('\0') {
            return Err(problem("NUL in the address".into()));
        }
        match kind {
            "unix" | "unix-listen" => {
                // sun_path has 108 bytes, the last one NUL.
                if address.is_empty() || address.len() > 107 {
                    return Err(problem("the path must have 1 to 107 bytes".into()));
                }
                let path = PathBuf::from(address);
                Ok(if kind == "unix" { Self::Unix { path } } else { Self::UnixListen { path } })
            }
            "tcp" | "tcp-listen" => {
                let (host, port) =
                    address.rsplit_once(':').ok_or_else(|| problem("expected HOST:PORT".into()))?;
                let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
                if bracketed.is_none() && host.contains(':') {
                    return Err(problem("an IPv6 address is written in brackets, [::1]:PORT".into()));
                }
                let host = bracketed.unwrap_or(host).to_owned();
                if host.is_empty() {
                    return Err(problem("the host is missing".into()));
                }
                if host.contains(['[', ']']) {
                    return Err(problem("a host has no brackets but those around an IPv6 address".into()));
                }
                let listen = kind == "tcp-listen";
                match port.parse() {
                    Ok(port) if listen => Ok(Self::TcpListen { host, port }),
                    Ok(port) if port > 0 => Ok(Self::Tcp { host, port }),
                    _ => Err(problem(format!("port {port:?} is not a number from 1 to 65535"))),
                }
            }
            other => Err(problem(format!(
                "unknown kind {other:?}; there are unix, unix-listen, tcp and tcp-listen"
            ))),
        }
    }
}

/// Splits at single commas; a doubled one stands for itself.
fn split_options(text: &str) -> (String, Vec<String>) {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        if char == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(char);
        }
    }
    let address = parts.remove(0);
    (address, parts)
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, address) = match self {
            Self::Unix { path } => ("unix", path.display().to_string()),
            Self::UnixListen { path } => ("unix-listen", path.display().to_string()),
            Self::Tcp { host, port } => ("tcp", host_port(host, *port)),
            Self::TcpListen { host, port } => ("tcp-listen", host_port(host, *port)),
        };
        write!(f, "{kind}:{}", address.replace(',', ",,"))
    }
}

fn host_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_wrong_is_named() {
        let error = |text: &str| text.parse::<Endpoint>().unwrap_err().to_string();
        assert!(error("/run/x.sock").contains("expected unix:PATH"));
        assert!(error("spice:x").contains("unknown kind \"spice\""));
        assert!(error("unix:/a,b").contains("unknown option \"b\""));
        assert!(error("unix:").contains("1 to 107 bytes"));
        assert!(error("tcp:::1:80").contains("in brackets"));
        assert!(error("tcp:host:0").contains("port \"0\""));
        assert!(error("tcp:[[a]]:1").contains("no brackets"));
        assert!(error("tcp:host:99999").contains("port \"99999\""));
        assert!(error("tcp::1").contains("host is missing"));
    }

    proptest! {
        #[test]
        fn any_text_is_an_endpoint_or_an_error(text in "(unix|tcp|tcp-listen|unix-listen)?:?.{0,40}") {
            if let Ok(endpoint) = text.parse::<Endpoint>() {
                prop_assert_eq!(endpoint.to_string().parse::<Endpoint>().unwrap(), endpoint);
            }
        }
    }
}
