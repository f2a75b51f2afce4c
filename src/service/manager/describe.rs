//! Completes the description of the API with what the middleware does for all operations: conditional requests, and links to
//! the next page.

use utoipa::openapi::path::{
    HttpMethod, Operation, OperationBuilder, Parameter, ParameterBuilder, ParameterIn, PathItem,
    Paths, PathsBuilder,
};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::{
    ContentBuilder, Header, HeaderBuilder, ObjectBuilder, OpenApi, Ref, RefOr, Required, Response,
    ResponseBuilder, Type,
};

fn header(description: &str) -> RefOr<Header> {
    let text = ObjectBuilder::new().schema_type(Type::String);
    let header = HeaderBuilder::new().schema(Some(text));
    RefOr::T(header.description(Some(description)).build())
}

fn parameter(name: &str, description: &str) -> Parameter {
    let text = ObjectBuilder::new().schema_type(Type::String);
    let parameter = ParameterBuilder::new()
        .name(name)
        .parameter_in(ParameterIn::Header)
        .required(Required::False)
        .schema(Some(text));
    parameter.description(Some(description)).build()
}

fn response<'a>(operation: &'a mut Operation, status: &str) -> Option<&'a mut Response> {
    match operation.responses.responses.get_mut(status)? {
        RefOr::T(response) => Some(response),
        RefOr::Ref(_) => None,
    }
}

/// Describes a GET: `ETag`, `If-None-Match`, and the link of a list.
fn describe_get(operation: &mut Operation) {
    let parameters = operation.parameters.get_or_insert_default();
    let is_list = parameters
        .iter()
        .any(|one| matches!(one, RefOr::T(one) if one.name == "cursor"));
    parameters.push(RefOr::T(parameter(
        "If-None-Match",
        "The ETag of an earlier response: the response is 304 while nothing has changed",
    )));
    if let Some(found) = response(operation, "200") {
        let tag = "Changes with the body; for If-None-Match";
        found.headers.insert("ETag".to_owned(), header(tag));
        if is_list {
            let link = "The next page, with `rel=\"next\"`; absent on the last page";
            found.headers.insert("Link".to_owned(), header(link));
        }
    }
    let unchanged = ResponseBuilder::new()
        .description("It is as it was with this ETag")
        .build();
    let responses = &mut operation.responses.responses;
    responses.insert("304".to_owned(), RefOr::T(unchanged));
}

/// Describes the requests that the manager sends.
fn webhooks() -> Paths {
    let content = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name("SaveNotice")))
        .build();
    let body = RequestBodyBuilder::new().content("application/json", content);
    let taken = ResponseBuilder::new()
        .description("The receiver has it; other statuses let it be sent again");
    let operation = OperationBuilder::new()
        .operation_id(Some("save_notice"))
        .summary(Some("Something has happened to a save."))
        .parameter(parameter(
            "webhook-id",
            "Unique; the same however often it is sent",
        ))
        .parameter(parameter("webhook-timestamp", "Seconds since the epoch"))
        .parameter(parameter(
            "webhook-signature",
            "By each secret, according to Standard Webhooks: `v1,` and base64",
        ))
        .request_body(Some(body.build()))
        .response("2XX", taken);
    let item = PathItem::new(HttpMethod::Post, operation);
    PathsBuilder::new().path("save", item).build()
}

/// Completes the description.
pub(super) fn complete(openapi: &mut OpenApi) {
    openapi.webhooks = Some(webhooks());
    for (path, item) in &mut openapi.paths.paths {
        if !path.starts_with("/api/") || path.ends_with("/events") {
            continue;
        }
        if let Some(operation) = &mut item.get {
            describe_get(operation);
        }
        for operation in [&mut item.post, &mut item.delete].into_iter().flatten() {
            if let Some(found) = response(operation, "202") {
                let at = "Where the state of the save is";
                found.headers.insert("Location".to_owned(), header(at));
            }
        }
    }
}
