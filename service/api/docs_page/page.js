"use strict";

// Swagger UI has a dark look, and leaves it to the page to ask for it.
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
const followColours = () => document.documentElement.classList.toggle("dark-mode", prefersDark.matches);
prefersDark.addEventListener("change", followColours);
followColours();

const isForm = (contentType) => /^(multipart\/|application\/x-www-form-urlencoded)/.test(contentType);

/*
 * Forms as this API means them: what is left empty is not sent. Swagger UI by itself fills every field with a sample,
 * down to the least or largest allowed number, and sends the empty ones as empty texts.
 */
const onlyWhatIsFilledIn = () => ({
  wrapComponents: {
    ParameterIncludeEmpty: () => () => null,
    RequestBody:
      (RequestBody, { React }) =>
      (props) => {
        if (!isForm(props.contentType)) {
          return React.createElement(RequestBody, props);
        }
        const properties = ["content", props.contentType, "schema", "properties"];
        return React.createElement(RequestBody, {
          ...props,
          fn: { ...props.fn, getSampleSchema: (schema) => schema.getIn(["examples", 0], undefined) },
          requestBody: props.requestBody.updateIn(properties, (fields) => fields && fields.map(withDefaultShown)),
        });
      },
  },
  statePlugins: {
    oas3: {
      wrapSelectors: {
        // No button that resets a form: it fills in the samples, and leaves files named that are not sent any more.
        hasUserEditedBody:
          (original, { oas3Selectors }) =>
          (_, ...operation) =>
            isForm(oas3Selectors.requestContentType(...operation)) ? false : original(...operation),
      },
    },
  },
});

const withDefaultShown = (field) => {
  const value = field.get("default");
  if (value === undefined || value === "" || value.size === 0) {
    return field;
  }
  return field.update("description", "", (text) => `${text} Default: \`${JSON.stringify(value)}\`.`);
};

/* Lists in forms are JSON texts, unless of files; Swagger UI's own widget for lists sends numbers in them as texts. */
const listsAsJson = () => ({
  wrapComponents: {
    JsonSchema_array:
      (FileList, { React, getComponent }) =>
      (props) => {
        const isOfFiles = props.schema.getIn(["items", "format"]) === "binary";
        return React.createElement(isOfFiles ? FileList : getComponent("JsonSchema_object"), props);
      },
  },
});

/* Arrays and the like are for downloading; Swagger UI would show their bytes as text. */
const binariesAsFiles = () => ({
  wrapComponents: {
    responseBody:
      (ResponseBody, { React }) =>
      (props) => {
        const isPicture = /^image\//.test(props.contentType);
        const contentType = props.content instanceof Blob && !isPicture ? "application/octet-stream" : props.contentType;
        return React.createElement(ResponseBody, { ...props, contentType });
      },
  },
});

/* The answer's first content type is the one that is asked for, as the list of them shows. */
const firstContentType = () => ({
  statePlugins: { spec: { wrapSelectors: { currentProducesFor: () => () => "" } } },
});

window.SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayRequestDuration: true,
  showCommonExtensions: true,
  defaultModelsExpandDepth: 0,
  // The default is a service on the Internet.
  validatorUrl: null,
  plugins: [onlyWhatIsFilledIn, listsAsJson, binariesAsFiles, firstContentType],
});
